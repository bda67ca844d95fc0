"""python -m tests.fuzz --cases 10000: every reader on damaged files, the command line on odd flags.

Whatever a file holds, a reader returns something sound or raises ValueError with one line, within
a time limit and without taking memory that the file does not account for. Seeds are in
tests/corpus/TARGET. With atheris installed (`pip install atheris`) coverage guides the damage, one
process per target; otherwise hypothesis draws it. A file that breaks the rule is kept.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib.util
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

CORPUS = Path(__file__).parent / "corpus"
SECONDS = 20.0  # per case; the slowest takes under one, but the machine may be busy
MEMORY_BYTES = 1 << 29  # per case; no seed is larger than a few kilobytes


class Fault(AssertionError):
    """Something worse than a refusal happened."""


class Hang(BaseException):
    """The time is over; no reader may mistake this for a damaged file."""


@dataclass(frozen=True)
class Target:
    """A reader: the name of the file it is given, and how to read that file and judge the result.

    read: takes the path and the content; AssertionError where the result cannot be right.
    named: whether a refusal has to name the file.
    """

    file: str
    read: Callable[[Path, bytes], object]
    named: bool = True


def check(target: Target, content: bytes, folder: Path) -> bool:
    """Give a reader its file in `folder`; return whether it was accepted.

    Errors: Fault where it was neither read nor refused as it should be.
    """
    path = folder / target.file
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _time_limit():
            target.read(path, content)
        accepted = True
    except ValueError as error:
        line, accepted = str(error), False
        if "\n" in line:
            raise Fault(f"more than one line: {line!r}") from error
        if target.named and str(path) not in line and str(folder) not in line:
            raise Fault(f"names no file: {line}") from error
    except Hang:
        raise Fault(f"took more than {SECONDS:.0f} seconds") from None
    except BaseException as error:  # SystemExit too
        raise Fault(f"{type(error).__name__}: {error}") from error
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > MEMORY_BYTES:
        raise Fault(f"took {grown >> 20} MiB")
    return accepted


@contextmanager
def _time_limit() -> Iterator[None]:
    def over(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What is read, and what a sound result is. Imported late: atheris has to see the imports.


def _idx(path: Path, content: bytes) -> None:
    from reat_fast.sources import read_idx

    array = read_idx(path)
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    assert array.dtype == np.uint8 and array.tobytes() == plain[4 + 4 * array.ndim :]


def _cifar(path: Path, content: bytes) -> None:
    from reat_fast.sources import checked, read_cifar

    archive = path.name.endswith(".tar.gz")
    if not archive:  # the other batch is the seed
        whole = seeds("cifar-binary" if path.suffix else "cifar-python")["whole"]
        path.with_name(f"test{path.suffix}").write_bytes(whole)
    source = checked(read_cifar(path if archive else path.parent, 100))
    if archive:
        assert _known(source.arrays[0], "cifar-archive"), "pixels that no seed has"
    _sound(source.arrays)


def _npz(path: Path, content: bytes) -> None:
    from reat_fast.sources import checked, read_npz

    arrays = checked(read_npz(path)).arrays
    assert all(_known(images, "npz") for images in arrays[::2]), "pixels that no seed has"
    _sound(arrays)


def _sound(arrays: Sequence[Any]) -> None:
    for images, labels in (arrays[:2], arrays[2:]):
        assert images.dtype == np.uint8 and images.ndim == 4 and len(images) == len(labels) > 0
        assert labels.dtype == np.int64 and labels.min() >= 0


@functools.lru_cache
def _pixels(target: str) -> frozenset[bytes]:
    """Return what the images of the seeds hold: a checksum guards it, so nothing else may come."""
    from reat_fast.sources import read_cifar, read_npz

    found = set()
    with tempfile.TemporaryDirectory() as folder:
        for name, content in seeds(target).items():
            if name.startswith("whole"):
                path = Path(folder, TARGETS[target].file)
                path.write_bytes(content)
                source = read_npz(path) if target == "npz" else read_cifar(path, 100)
                found |= {array.tobytes() for array in source.arrays[::2]}
    return frozenset(found)


def _known(images: Any, target: str) -> bool:
    return images.tobytes() in _pixels(target)


def _list(path: Path, content: bytes) -> None:
    from reat_fast.data import load_dataset

    _make_images(path.parent, ["a.png", "b c.png"])
    (path.parent / "test.txt").write_text("a.png 0\n")
    dataset = load_dataset("list", path.parent, image_size=4)
    lines = [line for line in content.decode().splitlines() if line.strip()]
    assert len(dataset.train) in (len(lines), len(lines) - 1)  # less one: the root
    _decoded(dataset.train.images)


def _annotations(path: Path, content: bytes) -> None:
    from reat_fast.data import load_dataset

    root = path.parents[1]
    (root / "wnids.txt").write_text("n01\nn02\n")
    for wnid in ("n01", "n02"):
        _make_images(root / "train" / wnid / "images", ["a.png"])
    _make_images(path.parent / "images", ["a.png", "b c.png"])
    _decoded(load_dataset("tiny-imagenet", root, image_size=4).test.images)


def _make_images(folder: Path, names: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if not (folder / name).exists():
            Image.new("RGB", (4, 4), (1, 2, 3)).save(folder / name)


def _decoded(images: Any) -> None:
    assert (images[:] == np.array((1, 2, 3), np.uint8)).all()


def _image(path: Path, content: bytes) -> None:
    from reat_fast.lazy import FileImages

    assert FileImages([path], 4)[0].shape == (4, 4, 3)


def _beton(path: Path, content: bytes) -> None:
    from reat_fast.beton_file import read_beton

    beton = read_beton(path)
    assert beton.images[:].shape == (len(beton.labels), *beton.images.shape[1:])


def _description(path: Path, content: bytes) -> None:
    from reat_fast.beton_folder import read
    from reat_fast.sources import checked

    for part in ("train", "test"):
        (path.parent / f"{part}.beton").write_bytes(seeds("beton")["whole-raw"])
    _sound(checked(read(path.parent)).arrays)


def _model(path: Path, content: bytes) -> None:
    from reat_fast.checkpoint import load_model_and_spec

    model, spec = load_model_and_spec(path)
    target = "weights" if path.suffix == ".safetensors" else "checkpoint"
    whole = b"".join(value for name, value in seeds(target).items() if name.startswith("whole"))
    for name, tensor in model.state_dict().items():
        assert tensor.numpy(force=True).tobytes() in whole, f"{name}: values of no seed"
    assert spec.num_classes == len(model.fc.weight)


def _config(path: Path, content: bytes) -> None:
    from reat_fast.config import from_json, to_json

    config = from_json(content.decode("utf-8", "replace"), str(path))
    assert from_json(to_json(config)) == config


def _flags(path: Path, content: bytes) -> None:
    from reat_fast.config import from_json, parse, to_json

    words = content.decode("utf-8", "replace").split("\n")
    try:
        _, config = parse(words, "reat")
    except SystemExit as ended:
        assert not ended.code  # --help
        return
    assert from_json(to_json(config)) == config


def _sweep(path: Path, content: bytes) -> None:
    from reat_fast.sweep import make_runs, read_lines

    lines = read_lines(path)
    runs = make_runs(lines, (0, 1), path.parent / "out")
    assert len(runs) == 2 * len(lines) > 0
    assert all(run.folder.parent == path.parent / "out" for run in runs)


def _record(path: Path, content: bytes) -> None:
    from reat_fast.report_data import read_run

    (path.parent / "config.json").write_bytes(seeds("config")["whole"])
    read_run(path.parent)


TARGETS = {
    "idx": Target("train-images-idx3-ubyte", _idx),
    "cifar-python": Target("train", _cifar),
    "cifar-binary": Target("train.bin", _cifar),
    "cifar-archive": Target("cifar-100-python.tar.gz", _cifar),
    "npz": Target("set.npz", _npz),
    "list": Target("train.txt", _list),
    "annotations": Target("val/val_annotations.txt", _annotations),
    "image": Target("image.png", _image),
    "beton": Target("train.beton", _beton),
    "beton-description": Target("dataset.json", _description),
    "checkpoint": Target("checkpoint-last.pt", _model),
    "weights": Target("last.safetensors", _model),
    "config": Target("config.json", _config),
    "evaluation": Target("evaluation.json", _record),
    "metrics": Target("metrics.csv", _record),
    "sweep": Target("presets.txt", _sweep),
    "flags": Target("flags", _flags, named=False),
}


@functools.lru_cache
def seeds(target: str) -> dict[str, bytes]:
    """Return the seed corpus of a target by name: whole files, and those called refused-*."""
    return {file.name: file.read_bytes() for file in sorted((CORPUS / target).iterdir())}


EDITS = ("write", "insert", "delete", "cut", "repeat")


@st.composite
def damaged(draw: st.DrawFn, originals: Sequence[bytes]) -> bytes:
    """Draw one of the files with one to four edits, most of them near its beginning or end."""
    content = bytearray(draw(st.sampled_from(originals)))
    positions = st.integers(-(2**14), 2**14)
    edits = st.tuples(st.sampled_from(EDITS), positions, st.binary(min_size=1, max_size=8))
    for kind, position, value in draw(st.lists(edits, min_size=1, max_size=4)):
        at = position % (len(content) + 1)
        match kind:
            case "write":
                content[at : at + len(value)] = value
            case "insert":
                content[at:at] = value
            case "delete":
                del content[at : at + value[0]]
            case "cut":
                del content[at:]
            case "repeat":
                content[at:at] = content[at : at + value[0]]
    return bytes(content)


def fuzz(name: str, cases: int, number: int | None = None) -> int:
    """Check a target on its seeds, damaged by hypothesis; return how many were accepted.

    number: the seed of the damage; None always draws the same.
    Errors: Fault, with the content that hypothesis found to be the simplest.
    """
    accepted = 0
    content = b""
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, TARGETS[name].file)
        path.parent.mkdir(parents=True, exist_ok=True)

        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            derandomize=number is None,
            suppress_health_check=list(HealthCheck),
        )
        @given(damaged(list(seeds(name).values())))
        def one(drawn: bytes) -> None:
            nonlocal accepted, content
            content = drawn
            accepted += check(TARGETS[name], drawn, Path(place))

        try:
            (one if number is None else seed(number)(one))()
        except Fault as fault:
            raise Fault(f"{name}: {fault}", content) from fault
    return accepted


def fuzz_by_coverage(name: str, cases: int, number: int, found: Path) -> None:
    """Check a target on what atheris makes of its seeds; ends the process, 0 if none broke."""
    import atheris

    with atheris.instrument_imports(include=["reat_fast"]):
        import reat_fast.data
        import reat_fast.report_data
        import reat_fast.sweep  # noqa: F401
    with tempfile.TemporaryDirectory() as place:
        corpus, folder = Path(place, "corpus"), Path(place, "files")
        (folder / TARGETS[name].file).parent.mkdir(parents=True)
        corpus.mkdir()
        for title, content in seeds(name).items():
            (corpus / title).write_bytes(content)
        largest = 2 * max(map(len, seeds(name).values()))
        atheris.Setup(
            [
                *("fuzz", f"-runs={cases}", f"-seed={number}", f"-max_len={largest}"),
                *("-rss_limit_mb=4096", "-timeout=60", f"-artifact_prefix={found / name}-"),
                str(corpus),
            ],
            lambda content: check(TARGETS[name], content, folder) and None,
        )
        atheris.Fuzz()


def main() -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="over all targets together")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "atheris", "hypothesis"), default="auto")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where faults go")
    parser.add_argument("--only-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    engine = options.engine
    if engine == "auto":
        engine = "atheris" if importlib.util.find_spec("atheris") else "hypothesis"
    options.found.mkdir(parents=True, exist_ok=True)
    each = -(-options.cases // len(options.targets))
    if options.only_here:
        fuzz_by_coverage(options.targets[0], options.cases, options.seed, options.found)
    faults = 0
    for name in options.targets:
        began = time.perf_counter()
        fault = _run_target(name, each, engine, options.seed, options.found)
        faults += bool(fault)
        seconds = time.perf_counter() - began
        print(f"{name}: {each} cases, {engine}, {seconds:.0f} s: {fault or 'no fault'}", flush=True)
    print(f"{each * len(options.targets)} cases, {faults} faults")
    return int(faults > 0)


def _run_target(name: str, cases: int, engine: str, number: int, found: Path) -> str:
    """Fuzz one target; return the fault in one line, if there is one."""
    if engine == "hypothesis":
        try:
            fuzz(name, cases, number)
        except Fault as fault:
            message, content = fault.args
            (found / f"{name}-fault").write_bytes(content)
            return f"{message} ({found / name}-fault)"
        return ""
    command = [sys.executable, "-m", "tests.fuzz", "--only-here", "--targets", name]
    command += ["--cases", str(cases), "--seed", str(number), "--found", str(found)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "Fault: " in line or "ERROR" in line]
    return f"{' '.join(lines[-1:]) or done.stderr[-300:]} ({found / name}-*)"


if __name__ == "__main__":
    sys.exit(main())

"""What tests/fuzz.py tries: readers, their seeds, and what a sound result is.

Readers are imported when they are called: atheris has to see the imports.
"""

from __future__ import annotations

import functools
import gzip
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True)
class Target:
    """A reader: the name of the file it is given, and how to read that file and judge the result.

    read: takes the path and the content; AssertionError where the result cannot be right.
    named: whether a refusal has to name the file.
    """

    file: str
    read: Callable[[Path, bytes], object]
    named: bool = True


@functools.lru_cache
def seeds(target: str) -> dict[str, bytes]:
    """Return the seed corpus of a target by name: whole files, and those called refused-*."""
    return {file.name: file.read_bytes() for file in sorted((CORPUS / target).iterdir())}


def _idx(path: Path, content: bytes) -> None:
    from reat_fast.sources.formats import read_idx

    array = read_idx(path)
    plain = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    assert array.dtype == np.uint8 and array.tobytes() == plain[4 + 4 * array.ndim :]


def _cifar(path: Path, content: bytes) -> None:
    from reat_fast.sources.cifar import read_cifar
    from reat_fast.sources.formats import checked

    archive = path.name.endswith(".tar.gz")
    if not archive:  # the other batch is the seed
        whole = seeds("cifar-binary" if path.suffix else "cifar-python")["whole"]
        path.with_name(f"test{path.suffix}").write_bytes(whole)
    source = checked(read_cifar(path if archive else path.parent, 100))
    if archive:
        assert _known(source.arrays[0], "cifar-archive"), "pixels that no seed has"
    _sound(source.arrays)


def _npz(path: Path, content: bytes) -> None:
    from reat_fast.sources.formats import checked, read_npz

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
    from reat_fast.sources.cifar import read_cifar
    from reat_fast.sources.formats import read_npz

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
    from reat_fast.sources.lazy import FileImages

    assert FileImages([path], 4)[0].shape == (4, 4, 3)


def _beton(path: Path, content: bytes) -> None:
    from reat_fast.sources.beton_file import read_beton

    beton = read_beton(path)
    assert beton.images[:].shape == (len(beton.labels), *beton.images.shape[1:])


def _description(path: Path, content: bytes) -> None:
    from reat_fast.sources.beton_folder import read
    from reat_fast.sources.formats import checked

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
    from reat_fast.storage.config_file import from_json, to_json

    config = from_json(content.decode("utf-8", "replace"), str(path))
    assert from_json(to_json(config)) == config


def _flags(path: Path, content: bytes) -> None:
    from reat_fast.config import parse
    from reat_fast.storage.config_file import from_json, to_json

    words = content.decode("utf-8", "replace").split("\n")
    try:
        _, config = parse(words, "reat")
    except SystemExit as ended:
        assert not ended.code  # --help
        return
    assert from_json(to_json(config)) == config


def _sweep(path: Path, content: bytes) -> None:
    from reat_fast.training.sweep_lines import read_lines
    from reat_fast.training.sweep_runs import make_runs

    lines = read_lines(path)
    data = path.parent / "data.npz"  # it is looked for, and read only by the runs
    data.touch()
    runs = make_runs(lines, (0, 1), path.parent / "out", data)
    assert len(runs) == 2 * len(lines) > 0
    assert all(run.folder.parent == path.parent / "out" for run in runs)


def _record(path: Path, content: bytes) -> None:
    from reat_fast.reporting.run_record import read_run

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

"""python -m tests.fuzz --cases 10000: every reader on damaged files, the command line on odd flags.

Whatever a file holds, a reader returns something sound or raises ValueError with one line, within
a time limit and without taking memory that the file does not account for. Seeds are in
tests/corpus/TARGET. With atheris installed (`pip install atheris`) coverage guides the damage, one
process per target; otherwise hypothesis draws it. A file that breaks the rule is kept.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_targets import TARGETS, Target, seeds  # noqa: E402

SECONDS = 20.0  # per case; the slowest takes under one, but the machine may be busy
MEMORY_BYTES = 1 << 29  # per case; no seed is larger than a few kilobytes


class Fault(AssertionError):
    """Something worse than a refusal happened."""


class Hang(BaseException):
    """The time is over; no reader may mistake this for a damaged file."""


def check(target: Target, content: bytes, folder: Path) -> bool:
    """Give a reader its file in `folder`; return whether it was accepted.

    Errors: Fault where it was neither read nor refused as it should be.
    """
    path = folder / target.file
    path.write_bytes(content)
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
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
    grown = _memory("VmHWM") - before
    if grown > MEMORY_BYTES:
        raise Fault(f"took {grown >> 20} MiB")
    return accepted


def _memory(entry: str) -> int:
    """Return what Linux counts for this process: VmRSS now, VmHWM at its peak, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(entry))


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
        import reat_fast.reporting.run_record
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="over all targets together")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--engine", choices=("auto", "atheris", "hypothesis"), default="auto")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="where faults go")
    parser.add_argument("--only-here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
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
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stdout.splitlines() if line.startswith(("Fault: ", "ALARM"))]
    return f"{' '.join(lines[:1]) or done.stdout[-300:]} ({found / name}-*)"


if __name__ == "__main__":
    sys.exit(main())

"""python -m bench.gpu --out DIR: everything that only a CUDA device can show, in one command.

Parity, the tests marked gpu, the ladder of the step, a whole epoch, evaluation, kernel times,
loaders and a short real training run one after another, each a program of its own with a limit, so
that one that fails or hangs leaves the others. The clocks of each are in the summary. Nothing is
left out in silence: the table at the end has a row for each.

Of the test tools it wants pytest, pytest-benchmark, pytest-timeout, hypothesis and pillow. One that
is missing costs what TOOLS says, and no more. Where no environment can be made, wheels on
PYTHONPATH will do: all but pillow have pure Python ones, hypothesis (with sortedcontainers) up to
6.155; later ones are compiled for one version of Python, as pillow is.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench.clocks import read_clocks, summary, watched_clocks
from bench.official import load_official
from bench.records import RESULTS
from reat_fast.cli.command import parse_flags, run_command
from reat_fast.env import environment


@dataclass(frozen=True)
class Options:
    """Run every check and measurement that needs a CUDA device."""

    out: Path
    """Folder for logs, tables and summary.json."""
    data: Path | None = None
    """CIFAR-10 as .npz (x_train, y_train, x_test, y_test) for the training; unset: none is run."""
    official: Path | None = None
    """A clone of the official REAT code, whose step and epoch are timed too."""
    epochs: int = 8
    """Epochs of the training."""
    parts: tuple[str, ...] = ()
    """Names of the parts to run; unset: all."""
    minutes: float = 9.0
    """The part that runs when so many minutes have passed is ended, and no other begins."""


@dataclass(frozen=True)
class Part:
    """One program of the suite."""

    name: str
    arguments: list[str]
    seconds: int


@dataclass(frozen=True)
class Outcome:
    """How a part ended: its exit code, or what kept it from one."""

    name: str
    command: str
    ended: int | str
    seconds: float
    clocks: dict[str, dict[str, float]] = field(default_factory=dict)


WIDE = (
    *("captured, eager", "captured, compiled", "captured, cudnn-stem"),
    *("captured, compiled, compiled update", "baseline, eager"),
)
"""Rungs of the ladder that WideResNet climbs too."""

WHOLE = ("captured, cudnn", "baseline, max-autotune")
"""The default beside what compiles for minutes."""

LENIENT = "--strict-markers --import-mode=importlib"
"""The addopts of pyproject.toml without --strict-config."""

TOOLS = {
    "pytest": "the parts tests and kernels",
    "pytest_benchmark": "the part kernels",
    "pytest_timeout": "the limit of each test; that of the part stays",
    "hypothesis": "the tests in files that import it, those of most kernels among them",
    "PIL": "the part loaders, and tests in files that import it",
}
"""Packages that the parts use beside those of the run time, and what is lost without them."""


def parts(options: Options) -> Iterator[Part]:
    """Yield the parts: checks, measurements by weight, and last what compiles for minutes."""
    official = [] if options.official is None else ["--official", str(options.official)]
    yield Part("verify", ["-m", "reat_fast.verify", "--device", "cuda"], 150)
    # A file whose imports are missing leaves the others.
    tests = ["-m", "gpu", "tests", "--durations=5", "--continue-on-collection-errors"]
    yield Part("tests", [*_pytest(limit=120), *tests], 300)
    # Classes as in training: the plain and the official form loop over samples of rare ones.
    step = ["-m", "bench.bench_step", "--labels", "long-tailed", "--keep"]
    # The last rung begun at 180 s may compile for a minute, and then all are timed.
    yield Part("step", [*step, *official, "--seconds", "180"], 270)
    yield Part("epoch", ["-m", "bench.bench_epoch", "--repeats", "1", "--keep", *official], 150)
    # One timed call: true float32, which only arithmetic limits, takes up to 20 s for each.
    evaluation = ["-m", "bench.bench_evaluation", "--repeats", "1", "--keep"]
    yield Part("evaluation", evaluation, 200)
    timed = ["--benchmark-only", f"--benchmark-json={options.out / 'kernels.json'}"]
    yield Part("kernels", [*_pytest(), "bench/bench_kernels.py", *timed], 200)
    wide = ["--model", "wrn28_10", "--repeats", "3", "--seconds", "90", "--rungs", *WIDE]
    yield Part("step-wrn", [*step, *wide], 150)
    if options.data is not None:
        run = ["--data", str(options.data), "--run-dir", str(options.out / "run")]
        drops = (str(options.epochs * share // 16) for share in (12, 15))  # as 60 and 75 of 80
        run += ["--epochs", str(options.epochs), "--milestones", *drops]
        train = ["-m", "reat_fast.train", "reat", "--fused", "--profile", "--eval-every", "100"]
        yield Part("training", [*train, *run], 300)
    yield Part("loaders", ["-m", "bench.bench_loaders", "--keep"], 120)
    yield Part("step-autotune", [*step, "--max-autotune", "--rungs", *WHOLE], 400)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 when every part ended well, else 1."""
    options = parse_flags(Options, list(arguments), "python -m bench.gpu")
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device was found: this suite measures nothing else")
    if options.official is not None:
        load_official(options.official)  # what is no clone of it is said before anything runs
    known = [part.name for part in parts(options)]
    for name in options.parts:
        if name not in known:
            raise ValueError(f"--parts {name}: there are {', '.join(known)}")
    options.out.mkdir(parents=True, exist_ok=True)
    missing = {name: cost for name, cost in TOOLS.items() if not _installed(name)}
    for name, cost in missing.items():
        print(f"{name} is not installed, which costs {cost}", flush=True)
    ends = time.perf_counter() + 60 * options.minutes
    outcomes: list[Outcome] = []
    for part in parts(options):
        if options.parts and part.name not in options.parts:
            continue
        left = ends - time.perf_counter()
        outcomes.append(_skipped(part) if left <= 0 else _run(part, options.out, left))
        _print(outcomes[-1])
        _summarise(outcomes, missing, options.out)
        for table in RESULTS.glob("*.csv"):  # now, for this program may be ended before the next
            (options.out / table.name).write_bytes(table.read_bytes())
    print(f"\n{'part':14} {'ended':>10} {'seconds':>8}")
    for outcome in outcomes:
        print(f"{outcome.name:14} {outcome.ended!s:>10} {outcome.seconds:8.1f}")
    return int(any(outcome.ended != 0 for outcome in outcomes))


def _pytest(limit: int | None = None) -> list[str]:
    """Return the call of pytest, with a limit in seconds for each test where that can be set."""
    call = ["-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if not _installed("pytest_timeout"):  # its setting in pyproject.toml would be an error
        return [*call, "-o", f"addopts={LENIENT}"]
    return call if limit is None else [*call, f"--timeout={limit}"]


def _run(part: Part, out: Path, left: float) -> Outcome:
    command = [sys.executable, *part.arguments]
    began = time.perf_counter()
    ended: int | str
    file = out / f"{part.name}.log"
    with file.open("w", encoding="utf-8") as log, watched_clocks() as readings:
        try:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            ended = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=min(part.seconds, left),
                env=environment,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            ended = "timed out"
    shown = shlex.join(["python", *part.arguments])
    seconds = round(time.perf_counter() - began, 1)
    return Outcome(part.name, shown, ended, seconds, summary(readings))


def _skipped(part: Part) -> Outcome:
    return Outcome(part.name, shlex.join(["python", *part.arguments]), "no time", 0.0)


def _print(outcome: Outcome) -> None:
    print(f"{outcome.name}: {outcome.ended} after {outcome.seconds} s", flush=True)


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _summarise(outcomes: list[Outcome], missing: dict[str, str], out: Path) -> None:
    found = {
        "environment": environment(),
        "missing": missing,
        "clocks_now": read_clocks(),
        "parts": [asdict(outcome) for outcome in outcomes],
    }
    (out / "summary.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

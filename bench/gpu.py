"""python -m bench.gpu --out DIR: everything that only a CUDA device can show, in one command.

Parity, the tests marked gpu, kernel times, the ladder of the step, loaders and a short real
training run one after another, each a program of its own with a limit, so that one that fails or
hangs leaves the others. Nothing is left out in silence: the table at the end has a row for each.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.records import RESULTS
from reat_fast.command import parse_flags, run_command
from reat_fast.env import environment


@dataclass(frozen=True)
class Options:
    """Run every check and measurement that needs a CUDA device."""

    out: Path
    """Folder for logs, tables and summary.json."""
    data: Path | None = None
    """CIFAR-10 as .npz (x_train, y_train, x_test, y_test) for the training; unset: none is run."""
    epochs: int = 8
    """Epochs of the training."""
    parts: tuple[str, ...] = ()
    """Names of the parts to run; unset: all."""
    minutes: float = 9.5
    """A part does not begin when so many minutes have passed."""


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


def parts(options: Options) -> Iterator[Part]:
    """Yield the parts, the checks before the measurements."""
    yield Part("verify", ["-m", "reat_fast.verify", "--device", "cuda"], 150)
    tests = ["-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    yield Part("tests", [*tests, "--timeout=120", "--durations=5"], 240)
    yield Part("step", ["-m", "bench.bench_step", "--keep"], 240)
    timed = ["--benchmark-only", "-q", "-p", "no:cacheprovider"]
    table = f"--benchmark-json={options.out / 'kernels.json'}"
    yield Part("kernels", ["-m", "pytest", "bench/bench_kernels.py", *timed, table], 200)
    yield Part("loaders", ["-m", "bench.bench_loaders", "--keep"], 120)
    if options.data is not None:
        run = ["--data", str(options.data), "--run-dir", str(options.out / "run")]
        drops = (str(options.epochs * share // 16) for share in (12, 15))  # as 60 and 75 of 80
        run += ["--epochs", str(options.epochs), "--milestones", *drops]
        train = ["-m", "reat_fast.train", "reat", "--fused", "--profile", "--eval-every", "100"]
        yield Part("training", [*train, *run], 300)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 when every part ended well, else 1."""
    options = parse_flags(Options, list(arguments), "python -m bench.gpu")
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device was found: this suite measures nothing else")
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    outcomes = []
    for part in parts(options):
        if options.parts and part.name not in options.parts:
            continue
        late = time.perf_counter() - began > 60 * options.minutes
        outcomes.append(_skipped(part) if late else _run(part, options.out))
        _print(outcomes[-1])
        _summarise(outcomes, options.out)
    for table in RESULTS.glob("*.csv"):
        (options.out / table.name).write_bytes(table.read_bytes())
    print(f"\n{'part':10} {'ended':>10} {'seconds':>8}")
    for outcome in outcomes:
        print(f"{outcome.name:10} {outcome.ended!s:>10} {outcome.seconds:8.1f}")
    return int(any(outcome.ended != 0 for outcome in outcomes))


def _run(part: Part, out: Path) -> Outcome:
    command = [sys.executable, *part.arguments]
    began = time.perf_counter()
    ended: int | str
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as log:
        try:
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            ended = subprocess.run(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=part.seconds,
                env=environment,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            ended = "timed out"
    shown = shlex.join(["python", *part.arguments])
    return Outcome(part.name, shown, ended, round(time.perf_counter() - began, 1))


def _skipped(part: Part) -> Outcome:
    return Outcome(part.name, shlex.join(["python", *part.arguments]), "no time", 0.0)


def _print(outcome: Outcome) -> None:
    print(f"{outcome.name}: {outcome.ended} after {outcome.seconds} s", flush=True)


def _summarise(outcomes: list[Outcome], out: Path) -> None:
    summary = {"environment": environment(), "parts": [asdict(outcome) for outcome in outcomes]}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

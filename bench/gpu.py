"""python -m bench.gpu --out DIR: everything that only a CUDA device can show, in six calls.

Parity, the tests marked gpu, the ladder of the step, evaluation, trainings, AutoAttack,
convolutions, kernels and loaders one after another, each a program of its own with a limit, so that
one that fails or hangs leaves the others. A part at its limit is told to end (SIGTERM) and keeps
what it has; GRACE seconds later it is ended. The clocks of each are in the summary. Nothing is left
out in silence: the table at the end has a row for each part, and for what was not given or found.

A call ends within 10 minutes, and all take the same DIR. --call 1, which is the default, decides
most: verify, tests, ladder, evaluation and the training of reat. --call 2 attacks that, trains and
attacks reat-plus and times a whole epoch. --call 3 times kernels, convolutions and WideResNet;
--call 4 trains and attacks at-bsl, runs kernels under compute-sanitizer, and times loaders and what
compiles for minutes; --call 5 and --call 6 train and attack reat-plus with the seeds 1 and 2.
gpu_parts.py has the estimates.
A training or an AutoAttack that was cut short goes on where it was when it runs again with the same
DIR: --parts train-reat attack-reat.

Of the test tools it wants pytest, pytest-benchmark, pytest-timeout, pytest-xdist, hypothesis and
pillow. One that is missing costs what TOOLS says, and no more. Where no environment can be made,
wheels on PYTHONPATH will do: all but pillow have pure Python ones, hypothesis (with
sortedcontainers) up to 6.155; later ones are compiled for one version of Python, as pillow is.
Rows name the commit; in a copy without .git, REAT_FAST_COMMIT has to say it.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from bench.clocks import read_clocks, summary, watched_clocks
from bench.gpu_parts import TOOLS, Options, Part, installed, parts
from bench.official import load_official
from bench.records import RESULTS
from bench.stopping import STOPPED, Stopped, stoppable
from reat_fast.cli.command import parse_flags, run_command
from reat_fast.env import environment
from reat_fast.storage.whole_files import write_atomically, write_text

GRACE = 20.0
"""Seconds between asking a part to end and ending it: for one more step of each rung."""


PACKED = "results.tar.gz"
LARGE = (".pt", ".safetensors")


@dataclass(frozen=True)
class Outcome:
    """How a part ended: its exit code, or what kept it from one."""

    name: str
    command: str
    ended: int | str
    seconds: float
    estimate: int
    lacks: bool = False
    """Whether it was left out for something that was not given or not found."""
    clocks: dict[str, dict[str, float]] = field(default_factory=dict)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 when every part that could run ended well, else 1."""
    began = time.perf_counter()
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
    missing = {name: cost for name, cost in TOOLS.items() if not installed(name)}
    for name, cost in missing.items():
        print(f"{name} is not installed, which costs {cost}", flush=True)
    outcomes: list[Outcome] = []
    try:
        with stoppable():
            _run_all(options, missing, outcomes, began + 60 * options.minutes)
    except Stopped:
        _keep_rows(options.out)
        _print_table(outcomes)
        return STOPPED
    _print_table(outcomes)
    return int(any(outcome.ended != 0 and not outcome.lacks for outcome in outcomes))


def _run_all(
    options: Options, missing: dict[str, str], outcomes: list[Outcome], ends: float
) -> None:
    machine = environment()
    before = _earlier(options.out)
    for part in parts(options):
        if part.name not in options.parts if options.parts else part.call != options.call:
            continue
        left = ends - time.perf_counter()
        if part.lacks or left <= 0:
            outcomes.append(_outcome(part, part.lacks or "no time"))
        else:
            outcomes.append(_run(part, options.out, left, _settings(machine)))
        print(f"{part.name}: {outcomes[-1].ended} after {outcomes[-1].seconds} s", flush=True)
        _summarise(outcomes, before, machine, missing, options.out)
        _keep_rows(options.out)  # now, for this program may be ended before the next


def _settings(machine: dict[str, object]) -> dict[str, str]:
    """Let rows name the commit as it was before other rows were appended to its files."""
    settings = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if machine.get("commit") and not machine.get("dirty"):
        settings["REAT_FAST_COMMIT"] = str(machine["commit"])
    return settings


def _run(part: Part, out: Path, left: float, settings: dict[str, str]) -> Outcome:
    command = [*part.under, sys.executable, *part.arguments]
    began = time.perf_counter()
    file = out / f"{part.name}.log"
    with file.open("w", encoding="utf-8") as log, watched_clocks() as readings:
        ended = _ended(command, log, min(part.seconds, left), settings | part.environment)
    return _outcome(part, ended, round(time.perf_counter() - began, 1), summary(readings))


def _ended(command: list[str], log: TextIO, seconds: float, settings: dict[str, str]) -> int | str:
    """Run a program with all that it starts in a group of its own, so that all of it ends."""
    program = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=settings, start_new_session=True
    )
    try:
        return program.wait(seconds)
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                program.wait(GRACE)
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()


def _keep_rows(out: Path) -> None:
    """Copy the tables of results, and pack all but checkpoints and weights into one file."""
    for table in RESULTS.glob("*.csv"):
        (out / table.name).write_bytes(table.read_bytes())
    packed = out / PACKED

    def fill(partial: Path) -> None:
        with tarfile.open(partial, "w:gz") as archive:
            for file in sorted(out.rglob("*")):
                if file.is_file() and file.suffix not in LARGE and packed.name not in file.name:
                    archive.add(file, file.relative_to(out))

    write_atomically(packed, fill)


def _outcome(
    part: Part,
    ended: int | str,
    seconds: float = 0.0,
    clocks: dict[str, dict[str, float]] | None = None,
) -> Outcome:
    tool = [Path(word).name for word in part.under[:1]] + part.under[1:]
    command = shlex.join([*tool, "python", *part.arguments]) if part.arguments else ""
    lacks = bool(part.lacks)
    return Outcome(part.name, command, ended, seconds, part.estimate, lacks, clocks or {})


def _print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'part':16} {'ended':>20} {'seconds':>8} {'estimate':>9}")
    for outcome in outcomes:
        print(
            f"{outcome.name:16} {outcome.ended!s:>20} {outcome.seconds:8.1f} {outcome.estimate:9}"
        )


def _earlier(out: Path) -> list[dict[str, Any]]:
    """Return what calls before this one left in the summary."""
    try:
        return list(json.loads((out / "summary.json").read_text("utf-8"))["parts"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _summarise(
    outcomes: list[Outcome],
    before: list[dict[str, Any]],
    machine: dict[str, object],
    missing: dict[str, str],
    out: Path,
) -> None:
    again = {outcome.name for outcome in outcomes}
    kept = [part for part in before if part.get("name") not in again]
    found = {
        "environment": machine,
        "missing": missing,
        "clocks_now": read_clocks(),
        "parts": [*kept, *(asdict(outcome) for outcome in outcomes)],
    }
    write_text(out / "summary.json", json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

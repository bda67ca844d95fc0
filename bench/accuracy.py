"""python -m bench.accuracy quickstart --seeds 0 1 2: train with several seeds, record the figures.

Each seed is a whole run of reat_fast.train as a program of its own. The figures are means over the
seeds with the spread beside them: clean and PGD-20 accuracy on the test set, overall and on the
tail, and the seconds of the whole program.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from bench.records import Figure, record
from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.config import PRESETS
from reat_fast.evaluation.figures import STANDARD_ATTACKS


@dataclass(frozen=True)
class Options:
    """Train a preset with several seeds and record mean and spread of its figures."""

    preset: Annotated[str, tyro.conf.Positional]
    """A preset of reat_fast.train."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of weights, order, augmentation and random starts; the subset stays."""
    flags: str = ""
    """Further flags for reat_fast.train, in one string."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.accuracy")
    if options.preset not in PRESETS:
        raise ValueError(f"unknown preset {options.preset!r}; presets: {', '.join(PRESETS)}")
    runs = [_train(options, seed) for seed in options.seeds]
    mean = partial(Figure.of, average=statistics.mean)
    figures = [
        mean(f"{options.preset} {attack} {part}", [run[attack][part] for run in runs], "%")
        for attack in STANDARD_ATTACKS
        for part in ("overall", "tail")
    ]
    seconds = [run["program"]["seconds"] for run in runs]
    figures.append(mean(f"{options.preset} whole program", seconds, "s"))
    command = shlex.join(["python", "-m", "bench.accuracy", *arguments])
    file = record(figures, choose_device("auto").type, command)
    for figure in figures:
        print(f"{figure.what:32} {figure.value:8.2f} {figure.unit}  spread {figure.spread:.2f}")
    print(f"{file} has {len(figures)} rows more")
    return 0


def _train(options: Options, seed: int) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "reat_fast.train", options.preset, "--fused"]
        command += [*options.flags.split(), "--seed", str(seed), "--run-dir", str(run_dir)]
        began = time.perf_counter()
        done = subprocess.run(command, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise ValueError(f"--seeds {seed}: {' '.join(command)} ended with {done.returncode}")
        evaluation = json.loads((run_dir / "evaluation.json").read_text("utf-8"))
    return {**evaluation["attacks"], "program": {"seconds": seconds}}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""python -m bench.bench_trained RUN: what a trained network withstands, and how long that takes.

Each line of attacks is python -m reat_fast.evaluate on the whole test set with its wall time, from
loading the network to the figures. A search of AutoAttack that was ended goes on when it is started
again with the same RUN, in whose folder its state is; its row then says that the time is of the
rest. The first row is the training itself, from the timing.csv of the run.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import tyro

from bench.records import Figure, record
from reat_fast import evaluate
from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.engine.precision import Precision
from reat_fast.evaluation import captured, passes
from reat_fast.evaluation.search_state import STATES
from reat_fast.storage.config_file import from_json

LINES = (("clean", "pgd20"), ("aa",))
"""Attacks that are timed together: AutoAttack alone."""


@dataclass(frozen=True)
class Options:
    """Evaluate a trained network and time it."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    precision: Precision = "bf16"
    """Arithmetic in which attacks search; verdicts are always in float32."""
    batch_size: int | None = None
    """Images per batch; changes no figure. Unset: as reat_fast.evaluate chooses."""
    launched: bool = False
    """Launch the kernels of the attacks one by one, to compare with graphs on a GPU."""
    subset: int | None = None
    """Only so many test images; unset: all."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results as they become known."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_trained")
    command = shlex.join(["python", "-m", "bench.bench_trained", *arguments])
    kind = choose_device(options.device).type
    file = options.run / "config.json"
    if not file.is_file():
        raise ValueError(f"{options.run}: holds no config.json; give the folder of a run")
    config = from_json(file.read_text("utf-8"), str(file))
    network = f"{config.model}, {config.epochs} epochs"

    def keep(figures: list[Figure]) -> None:
        for figure in figures:
            print(f"{figure.what:32}{figure.value:9.2f} {figure.unit}", flush=True)
        if options.keep:
            record(figures, kind, command)

    keep([_training(options.run, network)])
    for attacks in LINES:
        begun = set(options.run.glob(STATES))
        result = _evaluated(options, attacks)
        resumed = ", the rest" if begun - set(options.run.glob(STATES)) else ""
        shape = f"{network}, {result['samples']} images B={options.batch_size or 'auto'}"
        what = f"trained: {' '.join(attacks)}{', launched' * options.launched}"
        seconds = Figure(
            f"{what}{resumed}", result["seconds"], 0.0, 1, "s", shape, options.precision
        )
        keep([seconds, *_accuracies(result, shape, options.precision)])
    return 0


def _training(run: Path, network: str) -> Figure:
    """Sum up the seconds of training of all epochs, without warm-up and evaluations."""
    with (run / "timing.csv").open(newline="", encoding="utf-8") as table:
        epochs = [float(row["training_seconds"]) for row in csv.DictReader(table)]
    shape = f"{network}, {len(epochs)} of them timed"
    return Figure("trained: training", sum(epochs), 0.0, 1, "s", shape, "")


def _evaluated(options: Options, attacks: Sequence[str]) -> dict[str, Any]:
    out = options.run / f"evaluation-{'-'.join(attacks)}.json"
    flags = [str(options.run), "--attacks", *attacks, "--precision", options.precision]
    flags += ["--device", options.device, "--out", str(out)]
    if options.batch_size is not None:
        flags += ["--batch-size", str(options.batch_size)]
    if options.subset is not None:
        flags += ["--subset", str(options.subset)]
    out.unlink(missing_ok=True)  # it would add up the seconds
    with _without_graphs() if options.launched else nullcontext():
        code = evaluate.main(flags)
    if code:
        raise SystemExit(code)
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    return found


@contextmanager
def _without_graphs() -> Iterator[None]:
    with (
        mock.patch.object(captured, "WORTHWHILE_STEPS", math.inf),
        mock.patch.object(passes, "FIRST_LAUNCHES", math.inf),
    ):
        yield


def _accuracies(result: dict[str, Any], shape: str, precision: str) -> list[Figure]:
    return [
        Figure(f"trained: {attack} {part}", figures[part], 0.0, 1, "%", shape, precision)
        for attack, figures in result["attacks"].items()
        for part in ("overall", "tail")
        if figures.get(part) is not None
    ]


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

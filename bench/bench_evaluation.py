"""python -m bench.bench_evaluation: an attack of the evaluation, launched and from a CUDA graph.

A network with random weights and random images: how long an attack takes depends on neither. What
is timed is a whole call of evaluate(), with the networks prepared, the step captured and verdicts
in float32; the first call stands apart. Without a CUDA device nothing is replayed, and those rows
are left out.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.records import Figure, record
from bench.timing import seconds, timed
from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.cli.radius import Radius
from reat_fast.data import ImageSet
from reat_fast.engine.precision import Precision
from reat_fast.evaluate import evaluate
from reat_fast.evaluation import captured
from reat_fast.evaluation.attacks import Attack
from reat_fast.models import create_model

CLASSES = 10
Call = Callable[[], float]


@dataclass(frozen=True)
class Options:
    """Time one attack of the evaluation in each precision."""

    attack: str = "pgd20"
    """fgsm, pgdN, cwN or lsaN."""
    model: str = "resnet18"
    """A network of reat_fast.models."""
    images: int = 10_000
    """Random images."""
    size: int = 32
    """Height and width of the images."""
    batch_size: int = 500
    """Images per batch."""
    precisions: tuple[Precision, ...] = ("bf16", "tf32", "float32")
    """Arithmetics in which the attack searches."""
    eps: Radius = 8 / 255
    """L-infinity radius."""
    step_size: Radius = 2 / 255
    """Step of the attack."""
    repeats: int = 3
    """Timed calls of each row, after the first."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_evaluation")
    device = choose_device(options.device)
    flops = options.images * _flops_per_image(options)
    print(
        f"{options.attack} on {options.images:,} images of {options.size}x{options.size}, "
        f"{options.model}, batches of {options.batch_size}, {device}: {flops / 1e12:.1f} TFLOP"
    )
    print(
        f"{'search':9}{'steps':>10}{'s':>9}{'spread':>9}{'first s':>9}{'images/s':>10}"
        f"{'TFLOP/s':>9}{'robust %':>10}"
    )
    command = shlex.join(["python", "-m", "bench.bench_evaluation", *arguments])
    for precision, steps, call in _rows(options, device):
        first, robust = timed(call, device)
        times = [seconds(call, device) for _ in range(options.repeats)]
        what = f"evaluation: {options.attack} {steps}"
        shape = f"{options.model} N={options.images} B={options.batch_size}"
        figure = Figure.of(what, times, "s", shape, precision)
        print(
            f"{precision:9}{steps:>10}{figure.value:9.3f}{figure.spread:9.3f}{first:9.2f}"
            f"{options.images / figure.value:10.0f}{flops / figure.value / 1e12:9.2f}"
            f"{robust:10.2f}",
            flush=True,
        )
        if options.keep:  # now, for the program may be ended before the next
            record([figure], device.type, command)
    return 0


def _rows(options: Options, device: torch.device) -> Iterator[tuple[Precision, str, Call]]:
    """Yield precision, the way that steps are run, and the evaluation, which returns its figure."""
    torch.manual_seed(0)
    model = create_model(options.model, CLASSES).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    made = np.random.RandomState(0)
    shape = (options.images, options.size, options.size, 3)
    pixels = made.randint(0, 256, shape, dtype=np.uint8)
    image_set = ImageSet(pixels, made.randint(0, CLASSES, options.images).astype(np.int64))
    attack = Attack.from_name(options.attack, options.eps, options.step_size)

    def robust(precision: Precision) -> float:
        found = evaluate(
            model,
            image_set,
            [attack],
            CLASSES,
            eps=options.eps,
            batch_size=options.batch_size,
            precision=precision,
        )
        return float(found["attacks"][attack.name]["overall"])

    def launched(precision: Precision) -> float:
        with mock.patch.object(captured, "WORTHWHILE_STEPS", math.inf):
            return robust(precision)

    for precision in options.precisions:
        if device.type == "cuda":
            yield precision, "replayed", partial(robust, precision)
        yield precision, "launched", partial(launched, precision)


def _flops_per_image(options: Options) -> float:
    """Count forwards and input gradients, which cost the same, and the forward of the verdict."""
    model = create_model(options.model, CLASSES).eval()
    images = torch.zeros(2, 3, options.size, options.size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    passes = Attack.from_name(options.attack, options.eps, options.step_size).passes
    return passes * counter.get_total_flops() / 2


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

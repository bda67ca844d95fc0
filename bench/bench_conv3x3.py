"""python -m bench.bench_conv3x3: our 3x3 convolutions beside those of cuDNN, tile by tile.

Forward with bias, sum and ReLU, and the input gradient with sum and mask, for each shape of a
network that a kernel of ours takes, in bfloat16; see conv3x3_works. A result of ours has to be
about as near to float32 as the library's before it is timed. Which tile is best for a shape, and
whether it beats the library, is what choose_tile and conv3x3_pays of kernels/conv3x3.py have to be
told.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.conv3x3_works import Work, distance, works
from bench.records import Figure, record
from bench.stopping import STOPPED, Stopped, stoppable
from bench.timing import timed_calls
from bench.traced import Convolution, convolutions
from reat_fast.cli.command import choose_device, parse_flags, refuse_below, run_command
from reat_fast.cli.terminal import first_line
from reat_fast.engine.precision import full_precision
from reat_fast.kernels.boxes import why_not

NO_WORSE = 2.0
"""How many times as far from float32 a result may be as the library's."""


@dataclass(frozen=True)
class Options:
    """Time our 3x3 convolutions against those of cuDNN."""

    model: str = "resnet18"
    """A network of reat_fast.models."""
    batch_size: int = 128
    """Images per call."""
    size: int = 32
    """Height and width of the images."""
    shapes: int | None = None
    """Only so many shapes, from the first layer on; unset: all."""
    chosen: bool = False
    """Only the tiles that attacks take, in place of all."""
    calls: int = 10
    """Calls of which one time is the mean."""
    repeats: int = 5
    """Times of each row."""
    device: str = "auto"
    """auto, cuda or cuda:N."""
    keep: bool = False
    """Append each figure to bench/results as it becomes known."""

    def __post_init__(self) -> None:
        refuse_below(1, self, "batch_size", "size", "calls", "repeats")


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_conv3x3")
    command = shlex.join(["python", "-m", "bench.bench_conv3x3", *arguments])
    device = choose_device(options.device)
    reason = why_not(device)
    if reason is not None:
        raise ValueError(f"--device {options.device}: {reason}")
    torch.backends.cudnn.benchmark = True
    print(f"{options.model}, {options.batch_size} images, bfloat16; us")
    print(
        f"{'convolution':28}{'times':>6} {'computed':20}{'cuDNN':>8}{'ours':>8}{'ratio':>7}"
        f"{'TFLOP/s':>9}  pixels x channels / warps of a tile: us"
    )
    shapes = list(convolutions(options.model, options.size).items())
    try:
        with stoppable():
            for shape, count in shapes[: options.shapes]:
                for work in works(shape, options.batch_size, device, chosen=options.chosen):
                    figures = _row(shape, count, work, options, device)
                    if options.keep:
                        record(figures, device.type, command)
    except Stopped:
        print("stopped: the other shapes are left out")
        return STOPPED
    return 0


def _row(
    shape: Convolution, count: int, work: Work, options: Options, device: torch.device
) -> list[Figure]:
    """Time one computation in all forms and print it; returns the library's figure and ours."""

    def times(call: Callable[[], object]) -> list[float]:
        return timed_calls(call, device, options.calls, options.repeats)

    row = f"{options.model} B={options.batch_size} {shape.name}, {count} times"
    library = times(work.library)
    figures = [Figure.of(f"conv3x3: {work.name}, cuDNN", library, "s", row, "bfloat16")]
    found, notes = _ours(work, times)
    ranked = sorted(found, key=lambda name: statistics.median(found[name]))
    cells = f"{'none':>8}{'':16}"
    if ranked:
        what, row = f"conv3x3: {work.name}, ours", f"{row}, {ranked[0]}"
        own = Figure.of(what, found[ranked[0]], "s", row, "bfloat16")
        rate = shape.flops(options.batch_size) / own.value / 1e12
        cells = f"{own.value * 1e6:8.1f}{figures[0].value / own.value:7.2f}{rate:9.1f}"
        figures.append(own)
    tried = [f"{name} {1e6 * statistics.median(found[name]):.1f}" for name in ranked]
    cells = f"{figures[0].value * 1e6:8.1f}{cells}  {'; '.join(tried + notes)}"
    print(f"{shape.name:28}{count:6} {work.name:20}{cells}", flush=True)
    return figures


def _ours(
    work: Work, times: Callable[[Callable[[], object]], list[float]]
) -> tuple[dict[str, list[float]], list[str]]:
    """Time each of ours that computes rightly; returns the times, and what was wrong."""
    with full_precision():
        exact = work.exact()

    allowed = NO_WORSE * distance(work.library(), exact)
    found: dict[str, list[float]] = {}
    notes = []
    for name, call in work.own.items():
        try:
            if not (off := distance(call(), exact)) <= allowed:
                notes.append(f"{name}: off by {off:.1e}, allowed {allowed:.1e}")
                continue
            found[name] = times(call)
        except Exception as error:  # of the compiler, or for lack of shared memory
            notes.append(f"{name}: {first_line(error)[:60]}")
    return found, notes


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""python -m bench.bench_conv3x3: our 3x3 convolutions beside those of cuDNN, tile by tile.

Forward with bias, sum and ReLU, and the input gradient with sum and mask, for each shape of a
network that kernels.conv3x3 takes, in bfloat16. The library's side is what the attack does without
our kernels: cuDNN's fused forward; its input gradient and the pass that sums and masks. A result of
ours has to be about as near to float32 as the library's before it is timed. Which tile is best for
a shape, and whether it beats the library, is what kernels.conv3x3 has to be told.
"""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.bench_convolutions import timed_calls
from bench.bench_masked_gradients import NO_WORSE
from bench.records import Figure, record
from bench.stopping import STOPPED, Stopped, stoppable
from bench.traced import Convolution, convolutions
from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.config import flag
from reat_fast.engine.precision import full_precision
from reat_fast.kernels.conv3x3 import (
    RESIDENT,
    TILES,
    Tile,
    conv3x3,
    conv3x3_gradient,
    conv3x3_gradient_torch,
    conv3x3_runs_on,
    conv3x3_torch,
    why_not,
)
from reat_fast.kernels.fused_conv import conv_relu
from reat_fast.kernels.masked_sum import masked_sum
from reat_fast.kernels.resident_conv import resident_conv_runs_on

CANDIDATES = (
    *TILES,
    RESIDENT,
    Tile(128, 64, 8),
    Tile(256, 64, 8),
    Tile(128, 128, 8),
    Tile(64, 128, 4),
)
"""Tiles that are tried: those that may be chosen, with other warps, and one of few pixels."""


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
    calls: int = 10
    """Calls of which one time is the mean."""
    repeats: int = 5
    """Times of each row."""
    device: str = "auto"
    """auto, cuda or cuda:N."""
    keep: bool = False
    """Append each figure to bench/results as it becomes known."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "size", "calls", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class Work:
    """One computation: by the library, by ours with a tile, and in float32."""

    name: str
    library: Callable[[], Tensor]
    own: Callable[[Tile], Tensor]
    exact: Callable[[], Tensor]
    resident: bool
    """Whether its weights can stay in shared memory."""


def works(shape: Convolution, batch_size: int, device: torch.device) -> list[Work]:
    """Return what an attack asks of a convolution, on random tensors; [] for one we do not take."""
    plain = (shape.kernel, shape.stride, shape.padding, shape.groups) == (3, 1, 1, 1)
    if not plain or shape.in_width % 32:
        return []

    def made(*size: int) -> Tensor:
        values = torch.randn(size, device=device).to(torch.bfloat16)
        return values.contiguous(memory_format=torch.channels_last)

    x = made(batch_size, shape.in_width, shape.size, shape.size)
    behind = made(batch_size, shape.out_width, shape.size, shape.size)
    weight = made(shape.out_width, shape.in_width, 3, 3) / (9 * shape.in_width) ** 0.5
    bias, relu = weight.new_ones(shape.out_width), made(*x.shape).relu()
    if not conv3x3_runs_on(x, weight):
        return []

    def separate(other: Tensor | None) -> Tensor:
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False])
        backward = torch.ops.aten.convolution_backward
        gradient: Tensor = backward(behind, x, weight, None, *geometry)[0]
        return masked_sum(relu, gradient, other, out=gradient)

    def wide(*tensors: Tensor | None) -> list[Any]:
        return [None if tensor is None else tensor.float() for tensor in tensors]

    resident = resident_conv_runs_on(x, shape.out_width)
    found = []
    for name, summand in (("forward", None), ("forward, sum", torch.randn_like(behind))):
        library = partial(conv_relu, x, weight, bias, summand, padding=(1, 1))
        exact = partial(lambda *given: conv3x3_torch(*wide(*given)), x, weight, bias, summand)
        own = partial(lambda added, tile: conv3x3(x, weight, bias, added, tile=tile), summand)
        found.append(Work(name, library, own, exact, resident))
    for name, summand in (("gradient, mask", None), ("gradient, sum, mask", torch.randn_like(x))):
        given = (behind, weight, relu, summand)
        exact = partial(lambda *given: conv3x3_gradient_torch(*wide(*given)), *given)
        own = partial(lambda given, tile: conv3x3_gradient(*given, tile=tile), given)
        found.append(Work(name, partial(separate, summand), own, exact, resident))
    return found


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
        f"{'TFLOP/s':>9}  fastest tile, and others"
    )
    shapes = list(convolutions(options.model, options.size).items())
    try:
        with stoppable():
            for shape, count in shapes[: options.shapes]:
                for work in works(shape, options.batch_size, device):
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
    ranked = sorted(found, key=lambda tile: statistics.median(found[tile]))
    cells = f"{'none':>8}{'':16}"
    if ranked:
        best = ranked[0]
        row += f", tile {best.pixels}x{best.channels}, {best.warps} warps"
        row += ", weights resident" if best.resident else ""
        ours = Figure.of(f"conv3x3: {work.name}, ours", found[best], "s", row, "bfloat16")
        rate = shape.flops(options.batch_size) / ours.value / 1e12
        cells = f"{ours.value * 1e6:8.1f}{figures[0].value / ours.value:7.2f}{rate:9.1f}"
        figures.append(ours)
    tried = [f"{_short(tile)} {1e6 * statistics.median(found[tile]):.1f}" for tile in ranked]
    cells = f"{figures[0].value * 1e6:8.1f}{cells}  {'; '.join(tried + notes)}"
    print(f"{shape.name:28}{count:6} {work.name:20}{cells}", flush=True)
    return figures


def _short(tile: Tile) -> str:
    return "resident" if tile.resident else f"{tile.pixels}x{tile.channels}/{tile.warps}"


def _ours(
    work: Work, times: Callable[[Callable[[], object]], list[float]]
) -> tuple[dict[Tile, list[float]], list[str]]:
    """Time ours with each tile that computes rightly; returns the times, and what was wrong."""
    with full_precision():
        exact = work.exact()

    def distance(found: Tensor) -> float:
        return float((found.float() - exact).norm() / exact.norm())

    allowed = NO_WORSE * distance(work.library())
    found: dict[Tile, list[float]] = {}
    notes = []
    for tile in CANDIDATES:
        if tile.resident and not work.resident:
            continue
        try:
            if not (off := distance(work.own(tile))) <= allowed:
                notes.append(f"{_short(tile)}: off by {off:.1e}, allowed {allowed:.1e}")
                continue
            found[tile] = times(partial(work.own, tile))
        except Exception as error:  # of the compiler, or for lack of shared memory
            notes.append(f"{_short(tile)}: {str(error).splitlines()[0][:60]}")
    return found, notes


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

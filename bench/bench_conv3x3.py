"""python -m bench.bench_conv3x3: our 3x3 convolutions beside those of cuDNN, tile by tile.

Forward with bias, sum and ReLU, and the input gradient with sum and mask, for each shape of a
network that a kernel of ours takes, in bfloat16. The library's side is what the attack does without
our kernels: cuDNN's fused forward, images filled to 8 channels; its input gradient and the pass
that sums and masks. Where images are halved it is both ways of convolution and shortcut. A result
of ours has to be about as near to float32 as the library's before it is timed. Which tile is best
for a shape, and whether it beats the library, is what choose_tile and conv3x3_pays of
kernels/conv3x3.py have to be told.
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
import torch.nn.functional as F
from torch import Tensor

from bench.records import Figure, record
from bench.stopping import STOPPED, Stopped, stoppable
from bench.timing import timed_calls
from bench.traced import Convolution, convolutions
from reat_fast.cli.command import choose_device, parse_flags, refuse_below, run_command
from reat_fast.engine.precision import full_precision
from reat_fast.kernels import conv3x3 as ours
from reat_fast.kernels import strided_conv as strided
from reat_fast.kernels.boxes import Tile, largest_tile, why_not
from reat_fast.kernels.conv3x3 import RESIDENT, TILES
from reat_fast.kernels.fused_conv import Place, conv_relu, input_gradient
from reat_fast.kernels.own_conv import HALVED, SHORTCUT, Beside
from reat_fast.kernels.resident_conv import resident_conv_runs_on
from reat_fast.kernels.stem_conv import stem_conv, stem_conv_runs_on
from reat_fast.kernels.strided_gradient import (
    strided_gradient,
    strided_gradient_runs_on,
    strided_gradient_torch,
)
from reat_fast.networks.fused_relus import CHANNELS

OTHERS = (Tile(128, 64, 8), Tile(256, 64, 8), Tile(128, 128, 8), Tile(64, 128, 4))
CANDIDATES = (*TILES, RESIDENT, *OTHERS)
"""Tiles that are tried: those that may be chosen, with other warps, and one of few pixels."""
PAIR = (1, 1)
"""Stride and padding."""
TWICE = (2, 2)
Found = Tensor | tuple[Tensor, ...]


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


@dataclass(frozen=True)
class Work:
    """One computation: by the library, by kernels of ours under their names, and in float32."""

    name: str
    library: Callable[[], Found]
    own: dict[str, Callable[[], Found]]
    exact: Callable[[], Found]


class Case:
    """Random tensors of a convolution, channels_last, in bfloat16."""

    def __init__(
        self, shape: Convolution, batch_size: int, device: torch.device, chosen: bool = False
    ) -> None:
        self._chosen = chosen

        def made(*size: int) -> Tensor:
            values = torch.randn(size, device=device).to(torch.bfloat16)
            return values.contiguous(memory_format=torch.channels_last)

        self.x = made(batch_size, shape.in_width, shape.size, shape.size)
        self.behind = made(batch_size, shape.out_width, shape.out_size, shape.out_size)
        weight = made(shape.out_width, shape.in_width, 3, 3) / (9 * shape.in_width) ** 0.5
        filled = F.pad(weight, (0, 0, 0, 0, 0, -shape.in_width % CHANNELS))
        self.weight = filled.contiguous(memory_format=torch.channels_last)
        self.bias, self.relu = weight.new_ones(shape.out_width), made(*self.x.shape).relu()

    def forward(self, name: str, residual: Tensor | None) -> Work:
        """Return relu(conv(x) + bias + residual)."""
        given = (self.x, self.weight, self.bias, residual)
        library = partial(conv_relu, *given, padding=PAIR)
        own: dict[str, Callable[[], Found]] = {}
        if ours.conv3x3_runs_on(self.x, self.weight):
            own = {
                _name(tile): partial(ours.conv3x3, *given, tile=tile)
                for tile in self._tiles(self.x, len(self.weight))
            }
        elif residual is None and stem_conv_runs_on(self.x, self.weight, PAIR, PAIR):
            own = {"stem": partial(stem_conv, *given[:3], PAIR, PAIR)}
        narrow = self.weight[:, : self.x.shape[1]]
        exact = partial(_in_float32, ours.conv3x3_torch, self.x, narrow, self.bias, residual)
        return Work(name, library, own, exact)

    def gradient(self, name: str, relu: Tensor | None, other: Tensor | None) -> Work:
        """Return the gradient of x where relu > 0, after a sum with other."""
        channels = self.x.shape[1]

        def library() -> Tensor:
            x, place = self.x if relu is None else relu, Place(masks_input=relu is not None)
            geometry = (PAIR, PAIR, PAIR, 1)
            found = input_gradient(x, self.weight, self.behind, other, None, geometry, place)
            assert found is not None
            return found

        def own(tile: Tile) -> Tensor:
            found = ours.conv3x3_gradient(self.behind, self.weight, relu, other, tile=tile)
            return found[:, :channels]

        tiles: list[Tile] = []
        if ours.conv3x3_runs_on(self.behind, self.weight, gradient=True):
            tiles = self._tiles(self.behind, self.weight.shape[1])
        narrow = self.weight[:, :channels]
        exact = partial(_in_float32, ours.conv3x3_gradient_torch, self.behind, narrow, relu, other)
        return Work(name, library, {_name(tile): partial(own, tile) for tile in tiles}, exact)

    def halved(self, name: str) -> Work:
        """Return relu(conv(x) + bias) of this convolution, and the shortcut's beside it."""
        shortcut = self._shortcut()
        given = (self.x, self.weight, self.bias, shortcut)

        def library() -> tuple[Tensor, ...]:
            output = conv_relu(*given[:3], stride=TWICE, padding=PAIR)
            return output, F.conv2d(self.x, shortcut, stride=TWICE)

        def own(tile: Tile) -> tuple[Tensor, ...]:
            return _both(strided.strided_conv(*given, tile=tile))

        def exact() -> tuple[Tensor, ...]:
            wide: list[Any] = [tensor.float() for tensor in given]
            return _both(strided.strided_conv_torch(*wide))

        tiles = strided.TILES if strided.strided_conv_runs_on(self.x, self.weight) else ()
        if tiles and self._chosen:
            tiles = (largest_tile(tiles, self.behind, len(self.weight)),)
        return Work(name, library, {_name(tile): partial(own, tile) for tile in tiles}, exact)

    def halved_gradient(self, name: str) -> Work:
        """Return the gradient of x where relu > 0, of this convolution and a shortcut beside it."""
        beside, weight = torch.randn_like(self.behind), self._shortcut()

        def library() -> Tensor:
            near, place = Beside(beside, weight, SHORTCUT), Place(masks_input=True)
            given = (self.relu, self.weight, self.behind, None, near, HALVED, place)
            found = input_gradient(*given)
            assert found is not None
            return found

        given = (self.behind, self.weight, self.relu, None)
        own: dict[str, Callable[[], Found]] = {}
        if strided_gradient_runs_on(self.behind, self.weight, self.x):
            own["strided"] = partial(strided_gradient, *given, (beside, weight))

        def exact() -> Tensor:
            wide: list[Any] = [None if tensor is None else tensor.float() for tensor in given]
            return strided_gradient_torch(*wide, (beside.float(), weight.float()))

        return Work(name, library, own, exact)

    def _shortcut(self) -> Tensor:
        size = (*self.weight.shape[:2], 1, 1)
        weight = torch.randn(size, device=self.x.device, dtype=self.x.dtype)
        return weight.contiguous(memory_format=torch.channels_last) / size[1] ** 0.5

    def _tiles(self, read: Tensor, written: int) -> list[Tile]:
        if self._chosen:
            return [ours.choose_tile(read, written)]
        resident = resident_conv_runs_on(read, written)
        return [tile for tile in CANDIDATES if resident or not tile.resident]


def works(
    shape: Convolution, batch_size: int, device: torch.device, *, chosen: bool = False
) -> list[Work]:
    """Return what an attack asks of a convolution, as far as kernels of ours compute it."""
    if (shape.kernel, shape.padding, shape.groups) != (3, 1, 1) or shape.stride > 2:
        return []
    case = Case(shape, batch_size, device, chosen)
    found = [case.forward("forward", None)] if shape.stride == 1 else []
    if shape.stride == 2:
        found += [case.halved("forward, shortcut"), case.halved_gradient("gradients, mask")]
    elif shape.in_width < CHANNELS:  # of images, before which no ReLU stands
        found.append(case.gradient("gradient", None, None))
    else:
        found.append(case.forward("forward, sum", torch.randn_like(case.behind)))
        found.append(case.gradient("gradient, mask", case.relu, None))
        summand = torch.randn_like(case.x)
        found.append(case.gradient("gradient, sum, mask", case.relu, summand))
    return [work for work in found if work.own]


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
            notes.append(f"{name}: {(str(error) or repr(error)).splitlines()[0][:60]}")
    return found, notes


def distance(found: Found, exact: Found) -> float:
    """Return how far a result is from the exact one, as a share of that."""
    near, far = (
        torch.cat([tensor.float().flatten() for tensor in _each(side)]) for side in (found, exact)
    )
    return float((near - far).norm() / far.norm())


def _each(found: Found) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else found


def _both(found: tuple[Tensor, Tensor | None]) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in found if tensor is not None)


def _name(tile: Tile) -> str:
    if tile.resident:
        return "resident"
    return f"{tile.pixels}x{tile.channels}/{tile.warps}"


def _in_float32(compute: Callable[..., Tensor], *given: Any) -> Tensor:
    return compute(*(None if tensor is None else tensor.float() for tensor in given))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

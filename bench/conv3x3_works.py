"""What an attack asks of a 3x3 convolution: by the library, by kernels of ours, and in float32.

The library's side is what the attack does without our kernels: cuDNN's fused forward, images filled
to 8 channels; its input gradient and the pass that sums and masks. Where images are halved it is
both ways of convolution and shortcut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.traced import Convolution
from reat_fast.kernels import conv3x3 as ours
from reat_fast.kernels import strided_conv as strided
from reat_fast.kernels.boxes import Tile, largest_tile
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

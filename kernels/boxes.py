"""Boxes of images, which the hardware of Hopper and later fetches and stores by a descriptor.

What of a box lies outside the tensor is zero when it is fetched, and left alone when it is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reat_fast.kernels.triton_support import INTERPRETED, TensorDescriptor, cdiv, power_of_two

CAPABILITY = (9, 0)
"""The first that fetches boxes by itself."""
SHARED_MEMORY = 227 * 1024
"""Bytes that a program may take there, which the tiles are made for; an RTX 50 has 99 KiB."""
PROCESSORS = 132
"""Of an H100."""
PROGRAMS = PROCESSORS // 2 + 1
"""A tile that makes fewer is too large: half of it has all programs run at once still."""


class Tile(NamedTuple):
    """What one program computes: pixels of whole rows times channels, by so many warps.

    resident: computed by kernels.resident_conv, whose weights stay in shared memory.
    """

    pixels: int
    channels: int
    warps: int
    resident: bool = False


def why_not(device: torch.device) -> str | None:
    """Say what a device lacks to run such kernels, or nothing, as where Triton interprets them."""
    if not INTERPRETED and not _is_large_enough(device):
        return (
            f"needs a GPU of compute capability {CAPABILITY[0]}.{CAPABILITY[1]} with "
            f"{SHARED_MEMORY // 1024} KiB of shared memory, as an H100 is"
        )
    if TensorDescriptor is None:
        return "needs Triton 3.6: pip install triton"
    return None


def _is_large_enough(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:  # whose numbers mean other things
        return False
    if torch.cuda.get_device_capability(device) < CAPABILITY:
        return False
    properties: Any = torch.cuda.get_device_properties(device)
    return bool(properties.shared_memory_per_block_optin >= SHARED_MEMORY)


def dense(tensor: Tensor) -> bool:
    """Say whether a tensor is channels_last without gaps, from a multiple of 16 bytes on."""
    last = torch.channels_last
    return tensor.is_contiguous(memory_format=last) and tensor.data_ptr() % 16 == 0


def image_boxes(tensor: Tensor | None, box: list[int]) -> Any:
    """Describe images [B, C, H, W], channels_last, as [B, H, W, C]."""
    if tensor is None:
        return None
    batch, channels, *place = tensor.shape
    shape = [batch, *place, channels]
    # Those that PyTorch gives dimensions of one element may be anything.
    strides = [math.prod(shape[1:]), place[1] * channels, channels, 1]
    return TensorDescriptor(tensor, shape, strides, box)


def half_boxes(tensor: Tensor | None, box: list[int]) -> Any:
    """Describe images [B, C, H, W] of even sides, channels_last, as [B, H / 2, 2, W / 2, 2 * C]."""
    if tensor is None:
        return None
    batch, channels, height, width = tensor.shape
    line = width * channels
    shape = [batch, height // 2, 2, width // 2, 2 * channels]
    strides = [height * line, 2 * line, line, 2 * channels, 1]
    return TensorDescriptor(tensor, shape, strides, box)


def weight_boxes(weight: Tensor | None, box: list[int]) -> Any:
    """Describe a weight [K, C, R, S], channels_last, as a matrix [K, R * S * C]."""
    if weight is None:
        return None
    columns = weight[0].numel()
    return TensorDescriptor(weight, [len(weight), columns], [columns, 1], box)


def tile_sides(x: Tensor, pixels: int) -> tuple[int, int, int]:
    """Return images, rows and width of a tile of x: powers of two that cover whole rows."""
    height, width = map(power_of_two, x.shape[2:])
    rows = min(pixels // width, height)
    return pixels // (width * rows), rows, width


def largest_tile(tiles: Sequence[Tile], x: Tensor, channels: int, kinds: int = 1) -> Tile:
    """Return the first tile that divides the channels and makes PROGRAMS, or the last.

    x [B, C, H, W] is read, channels are written; kinds: programs of each tile.
    """
    last = tiles[-1]
    for tile in tiles:
        images, rows, _ = tile_sides(x, tile.pixels)
        bands = cdiv(len(x), images) * cdiv(x.shape[2], rows)
        fits = tile.channels == last.channels or channels % tile.channels == 0
        if fits and kinds * bands * cdiv(channels, tile.channels) >= PROGRAMS:
            return tile
    return last


def beside(tensor: Tensor | None, output: Tensor) -> Tensor | None:
    """Return what is added or masks, where it lies otherwise than boxes demand as a copy.

    Errors: ValueError for one of another shape or dtype than the result.
    """
    if tensor is None:
        return None
    if tensor.shape != output.shape or tensor.dtype != output.dtype:
        wrong, right = (f"{t.dtype} {list(t.shape)}" for t in (tensor, output))
        raise ValueError(f"residual, other or relu is {wrong}, the result {right}")
    tensor = tensor.contiguous(memory_format=torch.channels_last)
    return tensor if dense(tensor) else tensor.clone()

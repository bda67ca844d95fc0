"""conv3x3 for 64 channels to 64, whose weights stay in shared memory: the first stage of a ResNet.

The input gradient of its stem is one, too, to the few channels of images filled to 8.

There the tiles of kernels.conv3x3 read each pixel nine times and the weights anew for every tile,
more than the second-level cache of an H100 gives in time: a tile of 64 channels makes 51 products
and sums of a byte. Here the 72 KiB of weights are read once by each program, which then goes from
tile to tile, of which each box that it fetches serves three of the nine shifts. So a pixel is read
4.5 times.

Written in Gluon, Triton's language of layouts and barriers, as Triton cannot read a part of what it
fetched. For GPUs of compute capability 9 only, whose matrix instructions it names. On a CPU there
is nothing that runs it; tests/gluon_on_cpu.py does, with its copies and products early and late.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reat_fast.kernels import resident_conv_gluon as device
from reat_fast.kernels.triton_support import INTERPRETED, cdiv, power_of_two

CHANNELS = 64
PIXELS = 128
"""Of a tile: whole rows of one image."""
CAPABILITY = 9


def resident_conv_runs_on(x: Tensor, channels: int) -> bool:
    """Say whether the kernel takes x [B, C, H, W], where it is, to so many channels."""
    if not device.GLUON_INSTALLED or INTERPRETED or not x.is_cuda:
        return False
    if torch.cuda.get_device_capability(x.device)[0] != CAPABILITY:
        return False
    fits = x.shape[1] == CHANNELS and channels <= CHANNELS and channels % 8 == 0
    return fits and 16 <= _width(x) <= PIXELS // 2


def launch_resident_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    relu: Tensor | None,
    output: Tensor,
    *,
    gradient: bool,
    programs: int | None = None,
) -> None:
    """Fill output with what kernels.conv3x3 describes.

    x [B, 64, H, W], all else as there, with at most 64 channels in multiples of 8, W at most 64.
    programs: unset, one for each processor of the GPU.
    """
    if programs is None:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    batch, _, height, width = x.shape
    padded = _width(x)
    rows = PIXELS // padded
    bands = cdiv(height, rows)

    def boxes(tensor: Tensor | None, rows: int) -> Any:
        if tensor is None:
            return None
        channels = tensor.shape[1]
        shape = [batch, height, width, channels]
        strides = [height * width * channels, width * channels, channels, 1]
        block = [1, rows, padded, CHANNELS]
        return device.TensorDescriptor(tensor, shape, strides, block, _layout(4))

    inputs = weight.shape[1]
    shape = [len(weight), 9 * inputs]
    block = [CHANNELS, CHANNELS]
    device._resident_conv_kernel[(min(programs, batch * bands),)](
        boxes(x, rows),
        boxes(x, 2),
        device.TensorDescriptor(weight, shape, [shape[1], 1], block, _layout(2)),
        bias,
        boxes(added, rows),
        boxes(relu, rows),
        boxes(output, rows),
        batch * bands,
        bands,
        GRADIENT=gradient,
        INPUTS=inputs,
        OUTPUTS=len(weight),
        ROWS=rows,
        WIDTH=padded,
        CHANNELS=CHANNELS,
        num_warps=4,
    )


def _width(x: Tensor) -> int:
    """Return the width of the tiles: a power of two."""
    return power_of_two(x.shape[3])


def _layout(rank: int) -> Any:
    return device.gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)

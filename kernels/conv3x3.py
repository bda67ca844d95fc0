"""3x3 convolutions of stride 1 with all that surrounds them in an attack, in one kernel each way.

    y = relu(conv(x, w) + b + r)                dx = (conv^T(m, w) + s) [x > 0]

r is the residual, m the gradient behind the ReLU, s the gradient that another reader of x sends
back; x > 0 is the mask of the ReLU that x comes from. Libraries compute the convolutions, but the
mask of an input gradient takes a pass of its own through memory.

A program computes a tile of whole rows for some channels. The convolution is a sum over nine shifts
of the tile, in each of which channels are multiplied as matrices. Shifted tiles are boxes of the
images, which the hardware of Hopper and later fetches by a descriptor, zeros outside the images; an
input gradient is the same sum with the opposite shifts. Channels are the rows of the product and
pixels the columns, so that its second operand is what a box is in shared memory. Sums are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.kernels.boxes import (
    PROCESSORS,
    Tile,
    beside,
    dense,
    image_boxes,
    largest_tile,
    tile_sides,
    weight_boxes,
    why_not,
)
from reat_fast.kernels.maps import empty_channels_last
from reat_fast.kernels.resident_conv import (
    CHANNELS,
    PIXELS,
    launch_resident_conv,
    resident_conv_runs_on,
)
from reat_fast.kernels.triton_support import cdiv, jit, tl

TILES = (Tile(256, 128, 8), Tile(256, 64, 4), Tile(128, 128, 4), Tile(128, 64, 4))
"""From the one that reads least for its products, whose sums fill 128 registers of a thread."""
LEAST_OF_USE = 0.8
"""Share of the products in all waves of programs, of which cuDNN's smaller tiles waste fewer."""
RESIDENT = Tile(PIXELS, CHANNELS, 4, True)
DEPTH = 64
"""Channels that are multiplied at a time: 128 bytes of 16 bits, the widest rows of a box."""
STAGES = 4
"""Boxes that are on their way at a time; those of the largest tile take 192 of 227 KiB."""


def conv3x3_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Compute the forward in PyTorch: what the kernel is held against."""
    output = F.conv2d(x, weight, bias, padding=1)
    return F.relu(output if residual is None else output + residual)


def conv3x3_gradient_torch(
    masked: Tensor, weight: Tensor, relu: Tensor | None, other: Tensor | None
) -> Tensor:
    """Compute the input gradient in PyTorch: what the kernel is held against."""
    gradient = F.conv_transpose2d(masked, weight, padding=1)
    gradient = gradient if other is None else gradient + other
    return gradient if relu is None else torch.where(relu <= 0, 0, gradient)


@jit
def _conv3x3_kernel(  # type: ignore[no-untyped-def]
    input_desc,
    weight_desc,
    bias_ptr,
    added_desc,
    relu_desc,
    output_desc,
    height,
    channels,
    SUMMED: tl.constexpr,  # channels of the input
    GRADIENT: tl.constexpr,
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Programs of the same pixels run side by side. One axis: the others end at 65,535.
    parts = tl.cdiv(channels, CHANNELS)
    first_channel = tl.program_id(0) % parts * CHANNELS
    band = tl.program_id(0) // parts
    bands = tl.cdiv(height, ROWS)
    image = band // bands * IMAGES
    row = band % bands * ROWS
    PIXELS: tl.constexpr = IMAGES * ROWS * WIDTH

    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for step in range(9 * (SUMMED // DEPTH)):
        tap = step % 9
        first = step // 9 * DEPTH
        if GRADIENT:  # the weight of a tap met the pixel on its other side
            down, across = 1 - tap // 3, 1 - tap % 3
            # Of the weight [K, 9 * C] the input gradient sums over K, and the output over C.
            weight = weight_desc.load([first, tap * channels + first_channel]).T
        else:
            down, across = tap // 3 - 1, tap % 3 - 1
            weight = weight_desc.load([first_channel, tap * SUMMED + first])
        box = input_desc.load([image, row + down, across, first])
        sums = tl.dot(weight, box.reshape(PIXELS, DEPTH).T, sums)

    if bias_ptr is not None:
        channel = first_channel + tl.arange(0, CHANNELS)
        bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)
        sums += bias.to(tl.float32)[:, None]
    pixels = sums.T
    if added_desc is not None:
        added = added_desc.load([image, row, 0, first_channel]).reshape(PIXELS, CHANNELS)
        pixels += added.to(tl.float32)
    if GRADIENT:
        if relu_desc is not None:
            relu = relu_desc.load([image, row, 0, first_channel]).reshape(PIXELS, CHANNELS)
            # Where it is NaN the gradient passes, as in PyTorch.
            pixels = tl.where(relu.to(tl.float32) <= 0, 0.0, pixels)
    else:
        pixels = tl.maximum(pixels, 0.0, propagate_nan=tl.PropagateNan.ALL)
    pixels = pixels.to(output_desc.dtype).reshape(IMAGES, ROWS, WIDTH, CHANNELS)
    output_desc.store([image, row, 0, first_channel], pixels)


def conv3x3_runs_on(x: Tensor, weight: Tensor, *, gradient: bool = False) -> bool:
    """Say whether the kernels take x [B, C, H, W], or a gradient, and weight [K, C, 3, 3].

    They take bfloat16 and float16, channels_last, from addresses that are multiples of 16, rows of
    at most 128 pixels, channels that are read in multiples of 32 and written in multiples of 8, on
    a GPU that has boxes, or in Triton's interpreter.
    """
    if x.dtype != weight.dtype or x.dtype.itemsize != 2:
        return False
    if why_not(x.device) is not None:
        return False
    written, read = weight.shape[:2] if not gradient else weight.shape[1::-1]
    widths = read == x.shape[1] and read % 32 == 0 and written % 8 == 0
    laid = dense(x) and dense(weight) and widths
    return laid and weight.shape[2:] == (3, 3) and x.shape[3] <= 128 and x.numel() > 0


def conv3x3_pays(x: Tensor, channels: int) -> bool:
    """Say whether to expect that a kernel of ours beats cuDNN's and the pass behind it.

    x [B, C, H, W] is read, channels are written. On an H100 those with resident weights do; the
    others where the largest tile, or else one wave of programs, leaves few processors and products
    unused: 128 images of 128 channels 16x16 in 17.8 us against 21.7, but 28x28, of which tiles of
    32x8 waste a quarter, in 67.5 against 52.0 (python -m bench.bench_conv3x3). docs/kernels.md.
    """
    tile = choose_tile(x, channels)
    if tile.resident:
        return True
    waves = cdiv(_programs(x, channels, tile), PROCESSORS)
    made = waves * PROCESSORS * tile.pixels * tile.channels
    of_use = x.numel() // x.shape[1] * channels
    return of_use >= LEAST_OF_USE * made and (waves == 1 or tile == TILES[0])


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Return relu(conv2d(x, weight, padding=1) + bias + residual); has no gradient of its own.

    x [B, C, H, W], weight [K, C, 3, 3], residual and output [B, K, H, W], bias [K]; x and weight as
    conv3x3_runs_on says, the residual of the output's dtype. tile: unset, one by the shape.
    """
    output = empty_channels_last((len(x), len(weight), *x.shape[2:]), x)
    _launch(x, weight, bias, residual, None, output, tile, gradient=False)
    return output


def conv3x3_gradient(
    masked: Tensor,
    weight: Tensor,
    relu: Tensor | None = None,
    other: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """Return the input gradient of conv2d(x, weight, padding=1), plus other, where relu > 0.

    masked [B, K, H, W]: the gradient of the convolution's output; weight [K, C, 3, 3]; other, relu
    and what is returned [B, C, H, W]. Without relu nothing is masked.
    """
    gradient = empty_channels_last((len(masked), weight.shape[1], *masked.shape[2:]), masked)
    _launch(masked, weight, None, other, relu, gradient, tile, gradient=True)
    return gradient


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    added: Tensor | None,
    relu: Tensor | None,
    output: Tensor,
    tile: Tile | None,
    *,
    gradient: bool,
) -> None:
    depth, channels, height = x.shape[1], output.shape[1], x.shape[2]
    bias = None if bias is None else bias.contiguous()
    added, relu = beside(added, output), beside(relu, output)
    tile = tile or choose_tile(x, channels)
    if tile.resident:
        given = (x, weight, bias, added, relu, output)
        launch_resident_conv(*given, gradient=gradient)
        return
    pixels, tile_channels, warps, *_ = tile
    sides = images, rows, width = tile_sides(x, pixels)
    block = DEPTH if depth % DEPTH == 0 else 32
    part = [block, tile_channels] if gradient else [tile_channels, block]
    _conv3x3_kernel[(_programs(x, channels, tile),)](
        image_boxes(x, [*sides, block]),
        weight_boxes(weight, part),
        bias,
        image_boxes(added, [*sides, tile_channels]),
        image_boxes(relu, [*sides, tile_channels]),
        image_boxes(output, [*sides, tile_channels]),
        height,
        channels,
        SUMMED=depth,
        GRADIENT=gradient,
        IMAGES=images,
        ROWS=rows,
        WIDTH=width,
        CHANNELS=tile_channels,
        DEPTH=block,
        num_warps=warps,
        num_stages=STAGES,
    )


def _programs(x: Tensor, channels: int, tile: Tile) -> int:
    images, rows, _ = tile_sides(x, tile.pixels)
    return cdiv(channels, tile.channels) * cdiv(len(x), images) * cdiv(x.shape[2], rows)


def choose_tile(x: Tensor, channels: int) -> Tile:
    """Return the tile for an output of so many channels; where weights can be resident, they are.

    x [B, C, H, W] is what is read.
    """
    if resident_conv_runs_on(x, channels):
        return RESIDENT
    return largest_tile(TILES, x, channels)

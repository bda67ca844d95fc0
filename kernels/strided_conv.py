"""What a residual block computes first where it halves its images, in one kernel.

    y = relu(conv(x, w) + b)        z = conv(x, v)

w is a 3x3 convolution of stride 2 and padding 1, v the 1x1 convolution of stride 2 of the shortcut
beside it. Libraries compute two, and read x for each; for a ninth of the products the second takes
half the time of the first.

Read as [B, H / 2, 2, W / 2, 2 * C], what a tap meets of x is a box: of the three rows around an
even one, the first is the odd row of the half before, the others are even and odd of the same half,
and so for columns. Boxes are fetched by descriptors, zeros outside the images; channels are rows of
the product and pixels columns, sums float32, as in kernels.conv3x3. A program computes a tile of y
or of z: those of z are short, and start last, where the others leave processors idle.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.kernels.boxes import (
    Tile,
    dense,
    half_boxes,
    image_boxes,
    largest_tile,
    tile_sides,
    weight_boxes,
    why_not,
)
from reat_fast.kernels.maps import empty_channels_last
from reat_fast.kernels.triton_support import cdiv, jit, tl

TILES = (Tile(256, 128, 8), Tile(128, 128, 4), Tile(256, 64, 4), Tile(128, 64, 4))
"""From the one that reads least for its products, whose sums fill 128 registers of a thread."""
DEPTH = 64
STAGES = 4


def strided_conv_torch(
    x: Tensor, weight: Tensor, bias: Tensor | None, shortcut: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Compute both in PyTorch: what the kernel is held against."""
    output = F.relu(F.conv2d(x, weight, bias, stride=2, padding=1))
    return output, None if shortcut is None else F.conv2d(x, shortcut, stride=2)


@jit
def _strided_conv_kernel(  # type: ignore[no-untyped-def]
    input_desc,
    weight_desc,
    bias_ptr,
    shortcut_weight_desc,
    output_desc,
    shortcut_desc,
    height,  # of the output
    channels,
    SUMMED: tl.constexpr,  # channels of x
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Programs of the same pixels run side by side.
    parts = tl.cdiv(channels, CHANNELS)
    first_channel = tl.program_id(0) % parts * CHANNELS
    band = tl.program_id(0) // parts
    bands = tl.cdiv(height, ROWS)
    image = band // bands * IMAGES
    row = band % bands * ROWS
    is_shortcut = tl.program_id(1) == 1
    PIXELS: tl.constexpr = IMAGES * ROWS * WIDTH
    BLOCKS: tl.constexpr = SUMMED // DEPTH

    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for step in range(tl.where(is_shortcut, 0, 9 * BLOCKS)):
        tap = step % 9
        first = step // 9 * DEPTH
        down, across = tap // 3 + 1, tap % 3 + 1  # from the half before on: its odd pixel is 1
        weight = weight_desc.load([first_channel, tap * SUMMED + first])
        last = across % 2 * SUMMED + first
        box = input_desc.load([image, row + down // 2 - 1, down % 2, across // 2 - 1, last])
        sums = tl.dot(weight, box.reshape(PIXELS, DEPTH).T, sums)
    if shortcut_desc is not None:
        for step in range(tl.where(is_shortcut, BLOCKS, 0)):
            weight = shortcut_weight_desc.load([first_channel, step * DEPTH])
            box = input_desc.load([image, row, 0, 0, step * DEPTH])
            sums = tl.dot(weight, box.reshape(PIXELS, DEPTH).T, sums)

    if is_shortcut:
        if shortcut_desc is not None:
            pixels = sums.T.to(shortcut_desc.dtype).reshape(IMAGES, ROWS, WIDTH, CHANNELS)
            shortcut_desc.store([image, row, 0, first_channel], pixels)
    else:
        if bias_ptr is not None:
            channel = first_channel + tl.arange(0, CHANNELS)
            bias = tl.load(bias_ptr + channel, mask=channel < channels, other=0.0)
            sums += bias.to(tl.float32)[:, None]
        sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
        pixels = sums.T.to(output_desc.dtype).reshape(IMAGES, ROWS, WIDTH, CHANNELS)
        output_desc.store([image, row, 0, first_channel], pixels)


def strided_conv_runs_on(x: Tensor, weight: Tensor) -> bool:
    """Say whether the kernel takes x [B, C, H, W] and weight [K, C, 3, 3].

    It takes bfloat16 and float16, dense and channels_last, C in multiples of 32 and K of 8, H and W
    even and W at most 256, on a GPU that has boxes, or in Triton's interpreter.
    """
    if x.dtype != weight.dtype or x.dtype.itemsize != 2 or why_not(x.device) is not None:
        return False
    if not x.numel() or weight.shape[1:] != (x.shape[1], 3, 3) or not (dense(x) and dense(weight)):
        return False
    even = x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0 and x.shape[3] <= 256
    return even and x.shape[1] % 32 == 0 and len(weight) % 8 == 0


def strided_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return relu(conv2d(x, weight, stride=2, padding=1) + bias) and conv2d(x, shortcut, stride=2).

    x [B, C, H, W] and weight [K, C, 3, 3] as strided_conv_runs_on says, bias [K], shortcut
    [K, C, 1, 1] dense; both results [B, K, H / 2, W / 2], channels_last, without gradients of their
    own. Without a shortcut the second is None. tile: unset, one by the shape.
    """
    batch, depth, height, width = x.shape
    channels = len(weight)
    output = empty_channels_last((batch, channels, height // 2, width // 2), x)
    beside = None if shortcut is None else torch.empty_like(output)
    pixels, tile_channels, warps, *_ = tile or largest_tile(TILES, output, channels)
    sides = images, rows, padded = tile_sides(output, pixels)
    block = DEPTH if depth % DEPTH == 0 else 32
    bands = cdiv(batch, images) * cdiv(height // 2, rows)
    kinds = 1 if shortcut is None else 2
    _strided_conv_kernel[(cdiv(channels, tile_channels) * bands, kinds)](
        half_boxes(x, [images, rows, 1, padded, block]),
        weight_boxes(weight, [tile_channels, block]),
        None if bias is None else bias.contiguous(),
        weight_boxes(shortcut, [tile_channels, block]),
        image_boxes(output, [*sides, tile_channels]),
        image_boxes(beside, [*sides, tile_channels]),
        height // 2,
        channels,
        SUMMED=depth,
        IMAGES=images,
        ROWS=rows,
        WIDTH=padded,
        CHANNELS=tile_channels,
        DEPTH=block,
        num_warps=warps,
        num_stages=STAGES,
    )
    return output, beside

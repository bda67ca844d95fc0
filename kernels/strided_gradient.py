"""The gradient of what a residual block reads where it halves its images, in one kernel.

    dx = (conv^T(m, w) + conv^T(n, v) + s) [x > 0]

w is a 3x3 convolution of stride 2 and padding 1, v the 1x1 convolution of stride 2 beside it, m and
n the gradients of what they write; s is the gradient that another reader of x sends back. Libraries
compute two gradients of which the second is zero in three of four places, and leave their sum and
the mask to another pass.

A pixel of x is reached by few of the nine taps: those with an even row by one row of w, those with
an odd row by two, and so for columns. So the pixels fall into four kinds of 1, 2, 2 and 4 taps,
each a convolution of stride 1 over the smaller images; v reaches the first kind alone. A program
computes a tile of one kind, as in kernels.conv3x3: boxes by descriptors, channels as rows, sums in
float32. Read as [B, H / 2, 2, W / 2, 2 * C], a kind of pixels is a box of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.kernels.boxes import (
    Tile,
    beside,
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

TILES = (Tile(256, 128, 8), Tile(256, 64, 4), Tile(128, 64, 4))
"""From the one that reads least for its products. Channels of x are a multiple of a tile's, for
else it would write to the next pixel."""
KINDS = 4
DEPTH = 64
STAGES = 4


def strided_gradient_torch(
    masked: Tensor,
    weight: Tensor,
    relu: Tensor | None,
    other: Tensor | None,
    shortcut: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Compute it in PyTorch: what the kernel is held against."""
    gradient = F.conv_transpose2d(masked, weight, stride=2, padding=1, output_padding=1)
    if shortcut is not None:
        gradient = gradient + F.conv_transpose2d(*shortcut, stride=2, output_padding=1)
    gradient = gradient if other is None else gradient + other
    return gradient if relu is None else torch.where(relu <= 0, 0, gradient)


@jit
def _strided_gradient_kernel(  # type: ignore[no-untyped-def]
    input_desc,
    weight_desc,
    shortcut_desc,
    shortcut_weight_desc,
    added_desc,
    relu_desc,
    output_desc,
    height,
    SUMMED: tl.constexpr,  # channels of m and of n
    WRITTEN: tl.constexpr,  # channels of x
    IMAGES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    PARTS: tl.constexpr = WRITTEN // CHANNELS
    first_channel = tl.program_id(0) % PARTS * CHANNELS
    band = tl.program_id(0) // PARTS
    bands = tl.cdiv(height, ROWS)
    image = band // bands * IMAGES
    row = band % bands * ROWS
    kind = 3 - tl.program_id(1)  # those of most taps first, that none is left at the end
    odd_row = kind // 2
    odd_column = kind % 2
    PIXELS: tl.constexpr = IMAGES * ROWS * WIDTH
    BLOCKS: tl.constexpr = SUMMED // DEPTH

    sums = tl.zeros((CHANNELS, PIXELS), dtype=tl.float32)
    for step in range((1 + odd_row) * (1 + odd_column) * BLOCKS):
        # Even pixels meet the middle of w; odd ones its end, and its beginning one pixel on.
        down = step // BLOCKS // (1 + odd_column)
        across = step // BLOCKS % (1 + odd_column)
        tap = 3 * (1 + odd_row - 2 * down) + 1 + odd_column - 2 * across
        first = step % BLOCKS * DEPTH
        weight = weight_desc.load([first, tap * WRITTEN + first_channel])
        box = input_desc.load([image, row + down, across, first])
        sums = tl.dot(weight.T, box.reshape(PIXELS, DEPTH).T, sums)
    if shortcut_desc is not None:
        blocks = tl.where(odd_row + odd_column == 0, BLOCKS, 0)
        for step in range(blocks):
            weight = shortcut_weight_desc.load([step * DEPTH, first_channel])
            box = shortcut_desc.load([image, row, 0, step * DEPTH])
            sums = tl.dot(weight.T, box.reshape(PIXELS, DEPTH).T, sums)

    pixels = sums.T
    last = odd_column * WRITTEN + first_channel
    if added_desc is not None:
        added = added_desc.load([image, row, odd_row, 0, last]).reshape(PIXELS, CHANNELS)
        pixels += added.to(tl.float32)
    if relu_desc is not None:
        relu = relu_desc.load([image, row, odd_row, 0, last]).reshape(PIXELS, CHANNELS)
        # Where it is NaN the gradient passes, as in PyTorch.
        pixels = tl.where(relu.to(tl.float32) <= 0, 0.0, pixels)
    pixels = pixels.to(output_desc.dtype).reshape(IMAGES, ROWS, 1, WIDTH, CHANNELS)
    output_desc.store([image, row, odd_row, 0, last], pixels)


def strided_gradient_runs_on(masked: Tensor, weight: Tensor, x: Tensor) -> bool:
    """Say whether the kernel takes masked [B, K, H / 2, W / 2], weight and x [B, C, H, W].

    The weight is [K, C, 3, 3]. It takes bfloat16 and float16, dense and channels_last, K and C in
    multiples of 64, H and W even and W at most 256, on a GPU that has boxes, or in Triton's
    interpreter.
    """
    if masked.dtype.itemsize != 2 or why_not(masked.device) is not None or not x.numel():
        return False
    if weight.shape[2:] != (3, 3) or not all(map(dense, (masked, weight, x))):
        return False
    wide = all(width % 64 == 0 for width in weight.shape[:2]) and x.shape[3] <= 256
    halves = [2 * size for size in masked.shape[2:]] == list(x.shape[2:])
    fits = tuple(weight.shape[:2]) == (masked.shape[1], x.shape[1]) and len(masked) == len(x)
    return wide and halves and fits and masked.dtype == weight.dtype == x.dtype


def strided_gradient(
    masked: Tensor,
    weight: Tensor,
    relu: Tensor | None = None,
    other: Tensor | None = None,
    shortcut: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return the input gradient of a 3x3 convolution of stride 2, and more, where relu > 0.

    masked [B, K, H / 2, W / 2]: the gradient of the convolution's output; weight [K, C, 3, 3];
    other, relu and what is returned [B, C, H, W]; shortcut: gradient [B, K, H / 2, W / 2] and
    weight [K, C, 1, 1] of a convolution of stride 2 beside it. All dense and channels_last, as
    strided_gradient_runs_on says. Without relu nothing is masked.
    """
    batch, depth, height, width = masked.shape
    channels = weight.shape[1]
    gradient = empty_channels_last((batch, channels, 2 * height, 2 * width), masked)
    pixels, tile_channels, warps, *_ = largest_tile(TILES, masked, channels, KINDS)
    images, rows, padded = tile_sides(masked, pixels)
    other, relu = beside(other, gradient), beside(relu, gradient)
    near, near_weight = shortcut or (None, None)

    half = [images, rows, 1, padded, tile_channels]
    bands = cdiv(batch, images) * cdiv(height, rows)
    _strided_gradient_kernel[(channels // tile_channels * bands, KINDS)](
        image_boxes(masked, [images, rows, padded, DEPTH]),
        weight_boxes(weight, [DEPTH, tile_channels]),
        image_boxes(near, [images, rows, padded, DEPTH]),
        weight_boxes(near_weight, [DEPTH, tile_channels]),
        half_boxes(other, half),
        half_boxes(relu, half),
        half_boxes(gradient, half),
        height,
        SUMMED=depth,
        WRITTEN=channels,
        IMAGES=images,
        ROWS=rows,
        WIDTH=padded,
        CHANNELS=tile_channels,
        DEPTH=DEPTH,
        num_warps=warps,
        num_stages=STAGES,
    )
    return gradient

"""The convolution of images of few channels, with bias and ReLU, as the first layer computes it.

    y = relu(conv(x, w) + b)

Its product is short, 27 numbers for 3x3 pixels of 3 channels, and its output large: the kernel is
as fast as it can write. cuDNN fills the channels with zeros to 8 and takes 36 us for 128 images of
32x32 where writing takes 6 (H100, python -m bench.step_kernels). Here a program gathers the numbers
of its pixels, borders and all, and multiplies them as one matrix. Sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reat_fast.kernels.maps import empty_channels_last
from reat_fast.kernels.triton_support import cdiv, jit, kernel_runs_on, power_of_two, tl

PIXELS = 128
LONGEST = 64
"""Numbers of a product that one matrix may have."""
WIDEST = 128
"""Channels of an output that one program writes."""
FEW = 8
"""Channels of images are fewer than fill the 16 bytes that libraries want."""


@jit
def _stem_conv_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    batch_stride,
    channel_stride,
    row_stride,
    column_stride,
    weight_stride,
    height,
    width,
    output_height,
    output_width,
    outputs,
    size,
    CHANNELS: tl.constexpr,
    FILLED: tl.constexpr,  # channels of the weight
    KERNEL_ROWS: tl.constexpr,
    KERNEL_COLUMNS: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DEPTH: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    pixel = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    column = pixel % output_width * STRIDE - PADDING
    row = pixel // output_width % output_height * STRIDE - PADDING
    image = pixel // (output_width * output_height)
    # The numbers of a product: row of the kernel, column of it, channel.
    number = tl.arange(0, DEPTH)
    channel = number % CHANNELS
    down = number // CHANNELS // KERNEL_COLUMNS
    across = number // CHANNELS % KERNEL_COLUMNS
    used = number < KERNEL_ROWS * KERNEL_COLUMNS * CHANNELS

    rows, columns = row[:, None] + down[None, :], column[:, None] + across[None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    inside = inside & (pixel < size)[:, None] & used[None, :]
    place = image[:, None] * batch_stride + channel[None, :] * channel_stride
    place += rows * row_stride + columns * column_stride
    numbers = tl.load(x_ptr + place, mask=inside, other=0.0)

    output = tl.arange(0, OUTPUTS)
    tap = (down * KERNEL_COLUMNS + across) * FILLED + channel
    weight = tl.load(
        weight_ptr + output[None, :] * weight_stride + tap[:, None],
        mask=used[:, None] & (output < outputs)[None, :],
        other=0.0,
    )
    sums = tl.dot(numbers, weight)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + output, mask=output < outputs, other=0.0)
        sums += bias.to(tl.float32)[None, :]
    sums = tl.maximum(sums, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(
        output_ptr + pixel[:, None] * outputs + output[None, :],
        sums.to(output_ptr.dtype.element_ty),
        mask=(pixel < size)[:, None] & (output < outputs)[None, :],
    )


def stem_conv_runs_on(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> bool:
    """Say whether the kernel takes x [B, C, H, W] and weight [K, C or more, R, S], channels_last.

    It takes bfloat16 and float16, products of at most LONGEST numbers, K up to WIDEST.
    """
    if not kernel_runs_on(x) or x.dtype != weight.dtype or x.dtype.itemsize != 2:
        return False
    square = len(set(stride)) == 1 and len(set(padding)) == 1
    last = weight.is_contiguous(memory_format=torch.channels_last)
    length = x.shape[1] * weight.shape[2:].numel()
    fits = (
        x.shape[1] <= weight.shape[1]
        and x.shape[1] < FEW
        and length <= LONGEST
        and len(weight) <= WIDEST
    )
    return square and last and fits and x.numel() > 0


def stem_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
) -> Tensor:
    """Return relu(conv2d(x, weight) + bias), channels_last; has no gradient of its own.

    x [B, C, H, W] of any strides, weight [K, C + n, R, S] as stem_conv_runs_on says, of which the
    last n input channels would meet zeros; bias [K].
    """
    kernel_rows, kernel_columns = weight.shape[2:]
    height, width = (
        (size + 2 * pad - kernel) // step + 1
        for size, pad, kernel, step in zip(
            x.shape[2:], padding, weight.shape[2:], stride, strict=True
        )
    )
    batch, channels = x.shape[:2]
    output = empty_channels_last((batch, len(weight), height, width), x)
    size = batch * height * width
    _stem_conv_kernel[(cdiv(size, PIXELS),)](
        x,
        weight,
        None if bias is None else bias.contiguous(),
        output,
        *x.stride(),
        weight.stride(0),
        *x.shape[2:],
        height,
        width,
        len(weight),
        size,
        CHANNELS=channels,
        FILLED=weight.shape[1],
        KERNEL_ROWS=kernel_rows,
        KERNEL_COLUMNS=kernel_columns,
        STRIDE=stride[0],
        PADDING=padding[0],
        # Matrix instructions want at least 16.
        DEPTH=power_of_two(channels * kernel_rows * kernel_columns, 16),
        OUTPUTS=power_of_two(len(weight), 16),
        PIXELS=PIXELS,
    )
    return output

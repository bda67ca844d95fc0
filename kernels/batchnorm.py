"""BatchNorm of a training batch with the residual sum and the ReLU behind it.

    y = relu((x - mean) rstd gamma + beta + r)          g = dy [y > 0]
    dbeta = sum g          dgamma = rstd sum g (x - mean)          dr = g
    dx = gamma rstd (g - (dbeta + (x - mean) rstd dgamma) / N)

over the N = B H W values of a channel; r and the ReLU may be missing. As operations of their own,
norm, sum and ReLU write what the next one reads: here x is read twice forward, and y written once.
Backward, the mask of a ReLU without a sum is computed again from x, so that y is not read; with a
sum the first pass writes g, which is the residual's gradient, and the second reads it.

Channels are last in memory, so the images are a matrix [N, C]. Each position of a tile of rows and
channels keeps a mean and squared deviations of what it meets (Welford); they are joined by Chan's
formula, over the rows of the tile and over programs, so no large mean ruins a small variance. Sums
are float32, in an order that depends on nothing but the shape; no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reat_fast.kernels.batchnorm_triton import (
    _gradient_sums_kernel,
    _input_gradient_kernel,
    _join_gradients_kernel,
    _join_statistics_kernel,
    _normalise_kernel,
    _statistics_kernel,
)
from reat_fast.kernels.maps import DTYPES, are_per_channel
from reat_fast.kernels.triton_support import Backend, cdiv, power_of_two, use_triton

TILE = 4096  # numbers of a tile: 32 a thread with 4 warps
GRADIENT_TILE = 2048  # of one that is summed backward: more registers would keep programs waiting
WIDEST = 64  # channels of a tile: 128 bytes of 16 bits
PROGRAMS = 512  # that sum: near four for each of 132 multiprocessors
FINAL_CHANNELS = 8  # of a program that joins the sums of all others: 32 bytes of float32


def batchnorm_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """Compute it in PyTorch, as a network's own modules do: the definition, and the CPU path."""
    batches.add_(1)
    output = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    if residual is not None:
        output = output + residual
    return F.relu(output) if relu else output


def fused_batchnorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    batches: Tensor,
    momentum: float,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Normalise x [B, C, H, W] by its own statistics, add, rectify; may not sync.

    running_mean, running_var [C] and batches (int64, how many there were) are brought up to date
    as nn.BatchNorm2d does. The kernels take float32, bfloat16 and float16 with all else in float32
    and a residual like x, and round the output once; anything else takes PyTorch's operators. A
    gradient flows to x, weight, bias and residual, once.
    Raises ValueError for one value per channel, as PyTorch does.
    """
    given = (x, weight, bias, running_mean, running_var, batches, momentum, eps, residual, relu)
    if not _fits(x, residual, weight, bias, running_mean, running_var) or not use_triton(
        backend, x
    ):
        return batchnorm_torch(*given)
    if x.numel() == x.shape[1]:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.shape}"
        )
    output: Tensor = _BatchNorm.apply(*given)  # type: ignore[no-untyped-call]
    return output


class _BatchNorm(torch.autograd.Function):
    """The passes forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        batches: Tensor,
        momentum: float,
        eps: float,
        residual: Tensor | None,
        relu: bool,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        size, channels, tile = _matrix(x)
        steps, chunks = _chunks(size, channels, tile)
        parts = x.new_empty((2, chunks, channels), dtype=torch.float32)
        across = cdiv(channels, tile["COLUMNS"])
        _statistics_kernel[(chunks, across)](x, parts, size, channels, steps, **tile)
        mean, rstd = torch.empty_like(weight), torch.empty_like(weight)
        _join_statistics_kernel[(cdiv(channels, FINAL_CHANNELS),)](
            *(parts, mean, rstd, running_mean, running_var, batches),
            *(size, channels, chunks, steps * tile["ROWS"], momentum, eps),
            CHUNKS=PROGRAMS,
            COLUMNS=FINAL_CHANNELS,
        )
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        output = torch.empty_like(x)
        _normalise_kernel[(cdiv(size, tile["ROWS"]), across)](
            *(x, residual, mean, rstd, weight, bias, output, size, channels), RELU=relu, **tile
        )
        ctx.mask = 0 if not relu else 1 if residual is None else 2
        ctx.save_for_backward(x, output if ctx.mask == 2 else None, mean, rstd, weight, bias)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, output, mean, rstd, weight, bias = ctx.saved_tensors
        size, channels, tile = _matrix(x, GRADIENT_TILE)
        steps, chunks = _chunks(size, channels, tile)
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        masked = torch.empty_like(x) if ctx.mask == 2 else gradient
        parts = x.new_empty((2, chunks, channels), dtype=torch.float32)
        across = cdiv(channels, tile["COLUMNS"])
        _gradient_sums_kernel[(chunks, across)](
            *(gradient, x, output, masked, mean, rstd, weight, bias, parts),
            *(size, channels, steps),
            MASK=ctx.mask,
            **tile,
        )
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(weight)
        _join_gradients_kernel[(cdiv(channels, FINAL_CHANNELS),)](
            *(parts, rstd, of_weight, of_bias, channels, chunks),
            CHUNKS=PROGRAMS,
            COLUMNS=FINAL_CHANNELS,
        )
        _, _, tile = _matrix(x)
        of_x = torch.empty_like(x)
        _input_gradient_kernel[(cdiv(size, tile["ROWS"]), across)](
            *(masked, x, mean, rstd, weight, bias, of_weight, of_bias, of_x, size, channels),
            MASK=ctx.mask % 2,
            **tile,
        )
        of_residual = masked if ctx.needs_input_grad[8] else None
        return of_x, of_weight, of_bias, None, None, None, None, None, of_residual, None


def _fits(x: Tensor, residual: Tensor | None, *others: Tensor) -> bool:
    """Say whether the kernels take these tensors."""
    if x.ndim != 4 or x.dtype not in DTYPES or not x.numel():
        return False
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        return False
    return are_per_channel(x, *others)


def _matrix(x: Tensor, numbers: int = TILE) -> tuple[int, int, dict[str, int]]:
    """Return rows and columns of images whose channels are last, and a tile of them."""
    channels = x.shape[1]
    columns = min(WIDEST, power_of_two(channels))
    return x.numel() // channels, channels, {"ROWS": numbers // columns, "COLUMNS": columns}


def _chunks(size: int, channels: int, tile: dict[str, int]) -> tuple[int, int]:
    """Return how many tiles a program sums, and how many programs share a column."""
    tiles = cdiv(size, tile["ROWS"])
    steps = cdiv(tiles * cdiv(channels, tile["COLUMNS"]), PROGRAMS)
    return steps, cdiv(tiles, steps)

"""Average over the pixels and a linear layer behind it in one op, with a gradient for the maps.

    logits[b, k] = sum_c w[k, c] mean_p(x[b, c, p]) + bias[k]
    d loss / d x[b, c, p] = sum_k g[b, k] w[k, c] / P    [x[b, c, p] > 0]

For networks whose weights are constant, as during an attack. In PyTorch each way is three to five
small kernels, which wait longer for each other than they compute. Here each way is one: a program
has one image, whose maps and weights it reads once. Sums are float32, and so is the mean between
them, which PyTorch rounds to the dtype of the maps: what comes out is rounded once.

The mask is for maps that are the output of a ReLU which leaves it to its reader, see fused_conv.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reat_fast.kernels.triton_support import Backend, cdiv, jit, power_of_two, tl, use_triton

MOST_CLASSES = 1024
"""What the kernels take."""
FEW_CLASSES = 256
"""Up to which they should pay: each image reads all weights, which a matrix product does not."""

# Elements that a tile of maps or weights may have, and longest sides. Chosen from bench.aot, not
# timed.
FORWARD_TILE, FORWARD_WARPS = 8192, 8  # 4x4 maps of 512 channels, 32 elements a thread
BACKWARD_TILE, BACKWARD_WARPS = 4096, 4
MOST_PIXELS, CLASS_BLOCK = 64, 16


def pooled_linear_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the forward with PyTorch's own operators: the definition, and the path on the CPU."""
    return F.linear(x.mean((2, 3)), weight, bias)


def pooled_linear_gradient_torch(
    grad: Tensor, weight: Tensor, relu: Tensor | None, found: Tensor
) -> Tensor:
    """Write the gradient of the maps into `found` [B, C, H, W]; grad: that of the logits [B, K]."""
    pooled = grad.mm(weight) / found.shape[2:].numel()  # [B, C]
    spread = pooled[:, :, None, None].expand_as(found)
    if relu is None:
        return found.copy_(spread)
    torch.ops.aten.threshold_backward.grad_input(spread, relu, 0, grad_input=found)
    return found


@jit
def _pooled_linear_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [batch, pixels, channels]
    weight_ptr,  # [classes, channels]
    bias_ptr,  # [classes] or None
    logits_ptr,  # [batch, classes]
    pixels,
    channels,
    classes,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * CLASSES + tl.arange(0, CLASSES)
    known = row < classes
    x_ptr += image * pixels * channels
    sums = tl.zeros((CLASSES,), tl.float32)
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        exists = channel < channels
        weight = tl.load(
            weight_ptr + row[:, None] * channels + channel[None, :],
            mask=known[:, None] & exists[None, :],
            other=0.0,
        )
        total = tl.zeros((CHANNELS,), tl.float32)
        for start in range(0, pixels, PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            maps = tl.load(
                x_ptr + pixel[:, None] * channels + channel[None, :],
                mask=(pixel < pixels)[:, None] & exists[None, :],
                other=0.0,
            )
            total += tl.sum(maps.to(tl.float32), axis=0)
        mean = total / pixels
        sums += tl.sum(weight.to(tl.float32) * mean[None, :], axis=1)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + row, mask=known, other=0.0).to(tl.float32)
    tl.store(logits_ptr + image * classes + row, sums.to(logits_ptr.dtype.element_ty), mask=known)


@jit
def _pooled_linear_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [batch, classes]
    weight_ptr,  # [classes, channels]
    relu_ptr,  # [batch, pixels, channels] or None
    output_ptr,  # [batch, pixels, channels]
    pixels,
    channels,
    classes,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    total = tl.zeros((CHANNELS,), tl.float32)
    for first in range(0, classes, CLASSES):
        row = first + tl.arange(0, CLASSES)
        known = row < classes
        grad = tl.load(grad_ptr + image * classes + row, mask=known, other=0.0).to(tl.float32)
        weight = tl.load(
            weight_ptr + row[:, None] * channels + channel[None, :],
            mask=known[:, None] & exists[None, :],
            other=0.0,
        )
        total += tl.sum(weight.to(tl.float32) * grad[:, None], axis=0)
    share = total / pixels
    for start in range(0, pixels, PIXELS):
        pixel = start + tl.arange(0, PIXELS)
        place = (image * pixels + pixel)[:, None] * channels + channel[None, :]
        inside = (pixel < pixels)[:, None] & exists[None, :]
        if relu_ptr is not None:
            relu = tl.load(relu_ptr + place, mask=inside, other=0.0).to(tl.float32)
            # Where the maps are NaN the gradient passes, as in PyTorch.
            found = tl.where(relu <= 0, 0.0, share[None, :])
        else:
            found = tl.broadcast_to(share[None, :], (PIXELS, CHANNELS))
        tl.store(output_ptr + place, found.to(output_ptr.dtype.element_ty), mask=inside)


class _PooledLinear(torch.autograd.Function):
    """pooled_linear with its own backward, which wants the maps for their mask alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        masks_input: bool,
        own: bool,
    ) -> Tensor:
        ctx.save_for_backward(x if masks_input else None, weight)
        ctx.own, ctx.maps = own, torch.empty_like(x, device="meta")  # shape and layout
        if not own:
            return pooled_linear_torch(x, weight, bias)
        batch, channels = x.shape[:2]
        pixels, classes = x.shape[2:].numel(), len(weight)
        logits = x.new_empty((batch, classes))
        tiles = _tiles(pixels, channels, FORWARD_TILE)
        _pooled_linear_kernel[(batch, cdiv(classes, CLASS_BLOCK))](
            x,
            weight.contiguous(),
            None if bias is None else bias.contiguous(),
            logits,
            pixels,
            channels,
            classes,
            **tiles,
            num_warps=FORWARD_WARPS,
        )
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        relu, weight = ctx.saved_tensors
        found = torch.empty_like(ctx.maps, device=grad.device)
        if not ctx.own:
            found = pooled_linear_gradient_torch(grad, weight, relu, found)
            return found, None, None, None, None
        batch, channels = found.shape[:2]
        pixels = found.shape[2:].numel()
        tiles = _tiles(pixels, channels, BACKWARD_TILE)
        grid = (batch, cdiv(channels, tiles["CHANNELS"]))
        _pooled_linear_gradient_kernel[grid](
            grad.contiguous(),
            weight.contiguous(),
            relu,
            found,
            pixels,
            channels,
            len(weight),
            **tiles,
            num_warps=BACKWARD_WARPS,
        )
        return found, None, None, None, None


def pooled_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    masks_input: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Return linear(mean of x over its pixels, weight, bias); only x gets a gradient, once.

    x [B, C, H, W], weight [K, C] and bias [K] of one dtype, which the logits [B, K] have too. The
    kernels take dense channels_last maps of float32, bfloat16 or float16 and up to MOST_CLASSES;
    all else takes PyTorch's operators. They keep the mean in float32, so logits of bfloat16 and
    float16 are nearer to exact ones than PyTorch's.

    masks_input: x is the output of a ReLU that has no reader but this op and leaves its mask to
    it: the gradient is 0 where x <= 0. Raises ValueError for a weight or bias that asks for a
    gradient.
    """
    if any(t is not None and t.requires_grad for t in (weight, bias)):
        raise ValueError("pooled_linear has no gradient for weight and bias: give them detached")
    if x.ndim != 4:
        return pooled_linear_torch(x, weight, bias)
    own = use_triton(backend, x) and _fits(x, weight, bias)
    found: Tensor = _PooledLinear.apply(x, weight, bias, masks_input, own)  # type: ignore[no-untyped-call]
    return found


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    alike = weight.dtype == x.dtype and (bias is None or bias.dtype == x.dtype)
    shaped = weight.ndim == 2 and weight.shape[1] == x.shape[1]
    shaped = shaped and (bias is None or bias.shape == weight.shape[:1])
    dense = x.is_contiguous(memory_format=torch.channels_last) and x.numel() > 0
    return alike and shaped and dense and x.dtype != torch.float64 and len(weight) <= MOST_CLASSES


def _tiles(pixels: int, channels: int, elements: int) -> dict[str, int]:
    """Return sides of the tiles of maps and of weights, powers of two."""
    rows = min(power_of_two(pixels), MOST_PIXELS)
    columns = elements // max(rows, CLASS_BLOCK)
    return {
        "PIXELS": rows,
        "CHANNELS": min(power_of_two(channels), columns),
        "CLASSES": CLASS_BLOCK,
    }

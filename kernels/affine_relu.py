"""A BatchNorm with constant statistics, the ReLU behind it and a sum before it, in one pass.

    s = x + r                                        r optional
    y = relu(a s + b)                                a, b one number for each channel
    d loss / d x = d loss / d r = a (d loss / d y) [y > 0] + d loss / d s

For networks whose weights are constant, as during an attack, and whose BatchNorms read a sum: those
cannot be folded into a convolution. In PyTorch it is three passes forward and three backward, which
wait for memory. Here it is one each way; s is written only for a reader beside this op.

Arithmetic is float32, and s, y and the gradient are rounded once each. y comes from the rounded s:
so it is what a reader of s would compute, whether or not the sum was part of the op, as in PyTorch.
The mask is read off y, so neither s nor a s + b is kept. a and b get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reat_fast.kernels.maps import DTYPES, are_per_channel
from reat_fast.kernels.triton_support import Backend, cdiv, jit, power_of_two, tl, use_triton

# Numbers of a tile, and its most channels. Chosen from bench.aot, where 4096 spill; not timed.
TILE, WIDEST = 2048, 128  # 16 numbers a thread: two accesses of 16 bytes in bfloat16


def affine_relu_torch(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return y and s by PyTorch's own operators: the definition, and the path on the CPU."""
    total = x if residual is None else x + residual
    output = torch.addcmul(_spread(shift, x), total, _spread(scale, x))
    return F.relu(output).to(total.dtype), total


def affine_relu_gradient_torch(
    grad: Tensor, output: Tensor, scale: Tensor, other: Tensor | None
) -> Tensor:
    """Return scale grad [output > 0] + other; rounded once, to the dtype of the output."""
    found = torch.ops.aten.threshold_backward(grad, output, 0) * _spread(scale, output)
    if other is not None:
        found = found + other
    rounded: Tensor = found.to(output.dtype)
    return rounded


@jit
def _places(size, channels, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the tile of a program lies in [size, channels], what exists, and its columns."""
    program = tl.program_id(0)  # those side by side share rows; int64 has no instruction to divide
    rows = (program // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = program % across * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < channels
    inside = (rows < size)[:, None] & known[None, :]
    return rows[:, None] * channels + columns[None, :], inside, columns, known


@jit
def _affine_relu_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [size, channels]
    residual_ptr,  # or None
    scale_ptr,  # [channels]
    shift_ptr,
    output_ptr,
    total_ptr,  # or None
    size,
    channels,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    places, inside, columns, known = _places(size, channels, across, ROWS, COLUMNS)
    total = tl.load(x_ptr + places, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + residual).to(output_ptr.dtype.element_ty)
    if total_ptr is not None:
        tl.store(total_ptr + places, total, mask=inside)
    scale = tl.load(scale_ptr + columns, mask=known, other=0.0)[None, :]
    shift = tl.load(shift_ptr + columns, mask=known, other=0.0)[None, :]
    output = total.to(tl.float32) * scale + shift
    output = tl.where(output <= 0, 0.0, output)  # NaN stays, as in PyTorch
    tl.store(output_ptr + places, output.to(output_ptr.dtype.element_ty), mask=inside)


@jit
def _affine_relu_gradient_kernel(  # type: ignore[no-untyped-def]
    grad_ptr,  # [size, channels]
    output_ptr,
    scale_ptr,  # [channels]
    other_ptr,  # or None
    found_ptr,
    size,
    channels,
    across,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    places, inside, columns, known = _places(size, channels, across, ROWS, COLUMNS)
    grad = tl.load(grad_ptr + places, mask=inside, other=0.0).to(tl.float32)
    output = tl.load(output_ptr + places, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + columns, mask=known, other=0.0)[None, :]
    # Where the output is NaN the gradient passes, as in PyTorch.
    found = tl.where(output <= 0, 0.0, grad * scale)
    if other_ptr is not None:
        found += tl.load(other_ptr + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(found_ptr + places, found.to(found_ptr.dtype.element_ty), mask=inside)


class _AffineRelu(torch.autograd.Function):
    """Both ways; the second output is s, where somebody else reads it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        linked: bool,
        own: bool,
    ) -> tuple[Tensor, Tensor | None]:
        total: Tensor | None
        if own:
            output, total = _launch(x, residual, scale, shift, linked)
        else:
            output, total = affine_relu_torch(x, scale, shift, residual)
        ctx.own = own
        ctx.save_for_backward(output, scale)
        ctx.set_materialize_grads(False)
        if linked and residual is None:
            total = x.view_as(x)
        return output, total if linked else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, ...]:
        output, scale = ctx.saved_tensors
        if grad is None:
            found = other
        elif ctx.own:
            found = _launch_gradient(grad, output, scale, other)
        else:
            found = affine_relu_gradient_torch(grad, output, scale, other)
        wanted = [found if needed else None for needed in ctx.needs_input_grad[:2]]
        return *wanted, None, None, None, None


def affine_relu(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return relu(scale (x + residual) + shift); only x and residual get a gradient, once.

    x [B, C, H, W], residual as x, scale and shift [C]. The kernels take dense channels_last maps of
    float32, bfloat16 or float16 and a scale and shift of float32; all else takes PyTorch's
    operators, and a residual that is not as x is added by them. A sum is rounded to the dtype of x
    before it is scaled. Raises ValueError for a scale or shift that asks for a gradient.
    """
    return _apply(x, scale, shift, residual, False, backend)[0]


def affine_relu_linked(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output of affine_relu, and the sum that it scales, for who else reads that.

    Without a residual the second is x once more. The gradient that its readers send back is added
    in the pass that makes that of x.
    """
    output, total = _apply(x, scale, shift, residual, True, backend)
    assert total is not None
    return output, total


def _apply(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    linked: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    if scale.requires_grad or shift.requires_grad:
        raise ValueError("affine_relu has no gradient for scale and shift: give them detached")
    if residual is not None and not _alike(x, residual):
        x, residual = x + residual, None
    own = use_triton(backend, x) and _fits(x, residual, scale, shift)
    found: tuple[Tensor, Tensor | None] = _AffineRelu.apply(  # type: ignore[no-untyped-call]
        x, residual, scale, shift, linked, own
    )
    return found


def _launch(
    x: Tensor, residual: Tensor | None, scale: Tensor, shift: Tensor, linked: bool
) -> tuple[Tensor, Tensor | None]:
    output = torch.empty_like(x)
    total = torch.empty_like(x) if linked and residual is not None else None
    programs, sizes, tile = _tiles(x)
    _affine_relu_kernel[(programs,)](x, residual, scale, shift, output, total, *sizes, **tile)
    return output, total


def _launch_gradient(grad: Tensor, output: Tensor, scale: Tensor, other: Tensor | None) -> Tensor:
    grad = grad.contiguous(memory_format=torch.channels_last)
    if other is not None:
        other = other.contiguous(memory_format=torch.channels_last)
    found = torch.empty_like(output)
    programs, sizes, tile = _tiles(output)
    _affine_relu_gradient_kernel[(programs,)](grad, output, scale, other, found, *sizes, **tile)
    return found


def _alike(x: Any, residual: Any) -> bool:
    """Say whether both are maps of one shape and dtype; a traced network may add anything."""
    if not (isinstance(x, Tensor) and isinstance(residual, Tensor)):
        return False
    return (x.shape, x.dtype, x.device) == (residual.shape, residual.dtype, residual.device)


def _fits(x: Tensor, residual: Tensor | None, *others: Tensor) -> bool:
    """Say whether the kernels take these tensors."""
    if x.ndim != 4 or x.dtype not in DTYPES or not x.numel():
        return False
    maps = [x] if residual is None else [x, residual]
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in maps)
    return dense and are_per_channel(x, *others)


def _tiles(x: Tensor) -> tuple[int, tuple[int, int, int], dict[str, int]]:
    """Return the number of programs, rows, channels and tiles in a row, and the sides of a tile.

    Columns divide the channels where they hold 16 bytes, so that 160 channels leave no thread idle.
    """
    channels = x.shape[1]
    rows = x.numel() // channels
    columns = channels & -channels
    if columns < 8:
        columns = power_of_two(channels)
    columns = min(columns, WIDEST)
    tile = {"ROWS": TILE // columns, "COLUMNS": columns}
    across = cdiv(channels, columns)
    return cdiv(rows, tile["ROWS"]) * across, (rows, channels, across), tile


def _spread(values: Tensor, x: Tensor) -> Tensor:
    """Return values [C] in a shape that meets the channels of x."""
    return values.view(-1, *(1 for _ in range(x.ndim - 2)))

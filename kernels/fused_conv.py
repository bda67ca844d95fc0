"""Convolution, bias, residual sum and ReLU in one op, with a backward for the input alone.

    y = relu(conv(x, w) + b + r)
    d loss / d r = m = (d loss / d y) [y > 0]        d loss / d x = conv^T(m, w)

For networks whose weights are constant, as during an attack: w and b get no gradient. On a GPU the
forward is one cuDNN call, whose sums are in float32 and rounded once. The mask is read off the
output, so neither the sum before the ReLU nor the convolution's own output is kept.

cuDNN's fused engines want input channels that fill 16 bytes, which those of images do not. So w may
have more input channels than x: x is read as if zeros followed, and their gradient is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reat_fast.kernels.masked_sum import masked_sum

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation, groups."""


def conv_relu_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Compute the forward with PyTorch's own operators: the definition, and the path on the CPU."""
    x = _filled(x, weight, groups)
    output = F.conv2d(x, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)
    if residual is None:
        return F.relu(output)
    if residual.shape != output.shape:  # as cuDNN demands: the backward does not sum what is spread
        raise ValueError(f"residual is {list(residual.shape)}, the output {list(output.shape)}")
    return F.relu(output + residual)


def _conv_relu_cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    x = _filled(x, weight, groups)
    output: Tensor
    if residual is None:
        output = torch.ops.aten.cudnn_convolution_relu(x, weight, bias, *geometry)
    else:
        add_relu = torch.ops.aten.cudnn_convolution_add_relu
        output = add_relu(x, weight, residual, 1.0, bias, *geometry)
    return output


def _missing(x: Tensor, weight: Tensor, groups: int) -> int:
    """Return how many channels of the weight x has not."""
    return max(weight.shape[1] - x.shape[1], 0) if groups == 1 else 0


def _filled(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    missing = _missing(x, weight, groups)
    return F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x


def _shaped_as_filled(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return x, or in place of the filled one memory of its shape, whose values are nothing."""
    missing = _missing(x, weight, groups)
    if not missing:
        return x
    last = x.is_contiguous(memory_format=torch.channels_last)
    shape = (len(x), x.shape[1] + missing, *x.shape[2:])
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


class _ConvRelu(torch.autograd.Function):
    """conv_relu with its own backward; an output for each of readers, or for 0 one for anybody."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        geometry: Geometry,
        readers: int,
    ) -> Tensor | tuple[Tensor, ...]:
        # cuDNN has no such engine for float64.
        form = _conv_relu_cudnn if x.is_cuda and x.dtype != torch.float64 else conv_relu_torch
        output = form(x, weight, bias, residual, *geometry)
        ctx.geometry, ctx.has_residual, ctx.overwrites = geometry, residual is not None, readers > 0
        ctx.save_for_backward(x, weight, output)
        ctx.set_materialize_grads(False)
        if not readers:
            return output
        return (output, *(output.view_as(output) for _ in range(readers - 1)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, output = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        given = [grad for grad in grads if grad is not None]
        if not given:
            return (None,) * 6
        first, *others = given
        masked = masked_sum(output, first, *others, out=first if ctx.overwrites else None)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x, _, _ = torch.ops.aten.convolution_backward(
                masked,
                _shaped_as_filled(x, weight, groups),  # the input's values are for other gradients
                weight,
                None,
                stride,
                padding,
                dilation,
                False,
                [0] * len(stride),
                groups,
                [True, False, False],
            )
            grad_x = grad_x[:, : x.shape[1]]
        return grad_x, None, None, masked if ctx.has_residual else None, None, None


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """Return relu(conv2d(x, weight) + bias + residual); only x and residual get a gradient.

    x [B, C, H, W] and weight [K, C / groups, R, S] of one dtype, bias [K], residual shaped like the
    output [B, K, H', W']; the rest as in torch.nn.functional.conv2d. Without groups the weight may
    be [K, C + n, R, S]: x is filled with n channels of zeros. The gradient of ReLU at 0 is 0, as in
    PyTorch. float64 and CPU tensors take PyTorch's operators.
    Raises ValueError for a weight or bias that asks for a gradient, or a residual of another shape.
    """
    output: Tensor = _apply(x, weight, bias, residual, (stride, padding, dilation, groups), 0)
    return output


def conv_relu_for(
    readers: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> tuple[Tensor, ...]:
    """Return the output of conv_relu once for each of 1 or 2 readers, all in the same memory.

    Readers are convolutions, conv_relu or conv2d, as x or residual: they do not write to what they
    read, and nobody else has the gradient that one sends back. So the two are summed and masked in
    one pass, in the memory of the first. Such passes wait for memory: 1.7 of the 14.2 ms of a step
    of ResNet-18 on an H100 (python -m bench.step_kernels).
    """
    geometry = (stride, padding, dilation, groups)
    outputs: tuple[Tensor, ...] = _apply(x, weight, bias, residual, geometry, readers)
    return outputs


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    readers: int,
) -> Any:
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError("conv_relu has no gradient for weight and bias: give them detached")
    return _ConvRelu.apply(x, weight, bias, residual, geometry, readers)  # type: ignore[no-untyped-call]

"""Convolution, bias, residual sum and ReLU in one op, with a backward for the input alone.

    y = relu(conv(x, w) + b + r)
    d loss / d r = m = (d loss / d y) [y > 0]        d loss / d x = conv^T(m, w)

For networks whose weights are constant, as during an attack: w and b get no gradient. On a GPU the
forward is one cuDNN call, whose sums are in float32 and rounded once. The mask is read off the
output, so neither the sum before the ReLU nor the convolution's own output is kept.

Where x is itself such an output, the mask of that one is [x > 0]: the reader of x can apply it to
the gradient as it makes it, beside the gradient that another reader sends back (conv_relu_linked).
Where that is the convolution of a shortcut, one kernel can make both outputs, and one both
gradients.

cuDNN's fused engines want input channels that fill 16 bytes, which those of images do not. So w may
have more input channels than x: x is read as if zeros followed, and their gradient is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reat_fast.kernels.masked_sum import masked_sum
from reat_fast.kernels.own_conv import Beside, Geometry, Shortcut, own_forward, own_gradient
from reat_fast.kernels.triton_support import Backend


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


class Place(NamedTuple):
    """Where a conv_relu stands among others, and what computes it."""

    masks_input: bool = False
    """x is the output of one that leaves its mask to this one."""
    reader_masks: bool = False
    """The gradient that arrives is masked already."""
    backend: Backend = "auto"


class _ConvRelu(torch.autograd.Function):
    """conv_relu with its own backward; the second output is x, or the shortcut's convolution."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        geometry: Geometry,
        place: Place,
        shortcut: Tensor | None,
        shortcut_geometry: Geometry | None,
    ) -> tuple[Tensor, Tensor]:
        beside = None
        if shortcut is not None and shortcut_geometry is not None:
            beside = shortcut, shortcut_geometry
        own = own_forward(x, weight, bias, residual, beside, geometry, place.backend)
        if own is None:
            # cuDNN has no such engine for float64.
            form = _conv_relu_cudnn if x.is_cuda and x.dtype != torch.float64 else conv_relu_torch
            own = form(x, weight, bias, residual, *geometry), None
        output, second = own
        ctx.geometry, ctx.has_residual, ctx.place = geometry, residual is not None, place
        ctx.shortcut_geometry = shortcut_geometry
        ctx.save_for_backward(x, weight, None if place.reader_masks else output, shortcut)
        ctx.set_materialize_grads(False)
        if second is None:
            second = x.view_as(x) if beside is None else _convolved(x, *beside)
        return output, second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, other: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, output, shortcut = ctx.saved_tensors
        masked = grad if grad is None or output is None else masked_sum(output, grad)
        grad_x = None
        if ctx.needs_input_grad[0]:
            beside = None
            if other is not None and shortcut is not None:
                beside, other = Beside(other, shortcut, ctx.shortcut_geometry), None
            grad_x = input_gradient(x, weight, masked, other, beside, ctx.geometry, ctx.place)
        return grad_x, None, None, masked if ctx.has_residual else None, *(None,) * 4


def input_gradient(
    x: Tensor,
    weight: Tensor,
    masked: Tensor | None,
    other: Tensor | None,
    beside: Beside | None,
    geometry: Geometry,
    place: Place,
) -> Tensor | None:
    """Return conv^T(masked, weight) + other + beside's, masked where x <= 0 if it is to do that."""
    relu = x if place.masks_input else None
    if masked is not None:
        own = own_gradient(masked, weight, x, relu, other, beside, geometry, place.backend)
        if own is not None:
            return own
    if beside is not None:
        other = _convolved_back(x, beside.weight, beside.grad, beside.geometry)
    if masked is None:
        return other if other is None or relu is None else masked_sum(relu, other)
    found = _convolved_back(x, weight, masked, geometry)
    if relu is not None:
        return masked_sum(relu, found, other, out=found)
    return found if other is None else found + other


def _convolved(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return F.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups)


def _convolved_back(x: Tensor, weight: Tensor, grad: Tensor, geometry: Geometry) -> Tensor:
    """Return the input gradient that the library computes."""
    stride, padding, dilation, groups = geometry
    found: Tensor = torch.ops.aten.convolution_backward(
        grad,
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
    )[0]
    return found[:, : x.shape[1]]


def conv_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return relu(conv2d(x, weight) + bias + residual); only x and residual get a gradient.

    x [B, C, H, W] and weight [K, C / groups, R, S] of one dtype, bias [K], residual shaped like the
    output [B, K, H', W']; the rest as in torch.nn.functional.conv2d. Without groups the weight may
    be [K, C + n, R, S]: x is filled with n channels of zeros. The gradient of ReLU at 0 is 0, as in
    PyTorch. float64 and CPU tensors take PyTorch's operators. backend: "triton" has what a
    kernel of ours takes computed by it (kernels.own_conv).
    Raises ValueError for a weight or bias that asks for a gradient, or a residual of another shape.
    """
    geometry = (stride, padding, dilation, groups)
    return _apply(x, weight, bias, residual, geometry, Place(backend=backend))[0]


def conv_relu_linked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    masks_input: bool = False,
    reader_masks: bool = False,
    shortcut: Shortcut | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the output of conv_relu, and x once more, for the one other reader that x may have.

    shortcut: the convolution that is this reader, if it is one: its output is returned for x.

    masks_input: x is the output of one with reader_masks, and has no reader but this one and that
    of the second output: sum and mask of the gradient of x are made here, in one pass. Such passes
    wait for memory: 1.7 of the 14.2 ms of a step of ResNet-18 on an H100 (python -m
    bench.step_kernels), while a kernel of ours for the gradient makes them as it writes.
    """
    place = Place(masks_input, reader_masks, backend)
    geometry = (stride, padding, dilation, groups)
    return _apply(x, weight, bias, residual, geometry, place, shortcut)


def _apply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Geometry,
    place: Place,
    shortcut: Shortcut | None = None,
) -> tuple[Tensor, Tensor]:
    beside, beside_geometry = shortcut or (None, None)
    if any(t is not None and t.requires_grad for t in (weight, bias, beside)):
        raise ValueError("conv_relu has no gradient for weight and bias: give them detached")
    given = (x, weight, bias, residual, geometry, place, beside, beside_geometry)
    found: tuple[Tensor, Tensor] = _ConvRelu.apply(*given)  # type: ignore[no-untyped-call]
    return found

"""The gradient of the images through a strided convolution: one product and one scatter, on a CPU.

    columns = w^T (d loss / d y)        for each output pixel, what it sends to its window of x
    d loss / d x = the sum of the columns over the windows that hold a pixel (col2im)

For the first convolution of a network whose weights are constant. On two cores of an AMD EPYC it
is 2.9 times as fast as oneDNN's input gradient for grey images and a 3x3 kernel, 1.5 times for
colour and 7x7, and no faster for colour and 3x3 (bench/bench_cpu_convolutions.py). Without a stride
the windows overlap so much that nothing is won.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST_CHANNELS = 4
LARGE_KERNEL = 49  # pixels from which it is faster for more than one channel


class ImageConv2d(nn.Conv2d):
    """Conv2d with frozen weights whose input gradient is a product and a scatter.

    Made by use_col2im_.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x)
        output: Tensor = _Convolve.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.stride, self.padding
        )
        return output


def use_col2im_(network: nn.Module) -> list[ImageConv2d]:
    """Let the strided convolutions of few channels of a frozen network compute so; return them.

    Parameters, names and results, to rounding, stay.
    Errors: ValueError for weights that ask for a gradient.
    """
    changed = []
    for name, module in network.named_modules():
        if type(module) is not nn.Conv2d or not _fits(module):
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"{name}: its weights ask for a gradient, which this form has not")
        module.__class__ = ImageConv2d
        assert isinstance(module, ImageConv2d)
        changed.append(module)
    return changed


def image_gradient(
    gradient: Tensor,
    weight: Tensor,
    size: tuple[int, int],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
) -> Tensor:
    """Return d loss / d x [B, C, *size] for y = conv2d(x, weight) and gradient d loss / d y.

    gradient [B, K, H', W'], weight [K, C, R, S], groups and dilation 1.
    """
    rows = gradient.flatten(2)  # [B, K, H' W']
    columns = weight.flatten(1).t() @ rows  # [B, C R S, H' W']
    return F.fold(columns, size, weight.shape[2:], padding=padding, stride=stride)


def _fits(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    strided = min(conv.stride) >= 2 and not isinstance(conv.padding, str)
    large = conv.kernel_size[0] * conv.kernel_size[1] >= LARGE_KERNEL
    faster = conv.in_channels == 1 or (large and conv.in_channels <= MOST_CHANNELS)
    return plain and strided and faster


class _Convolve(torch.autograd.Function):
    """conv2d with the gradient of its input alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.size, ctx.stride, ctx.padding = x.shape[2:], stride, padding
        ctx.layout = torch.contiguous_format
        if x.is_contiguous(memory_format=torch.channels_last):
            ctx.layout = torch.channels_last
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        found = image_gradient(gradient, weight, ctx.size, ctx.stride, ctx.padding)
        return found.contiguous(memory_format=ctx.layout), None, None, None, None

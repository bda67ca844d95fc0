"""Our convolutions of the attack against float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast.kernels.boxes import why_not
from reat_fast.kernels.conv3x3 import conv3x3, conv3x3_gradient
from reat_fast.kernels.strided_conv import strided_conv
from reat_fast.kernels.strided_gradient import strided_gradient
from reat_fast.kernels.triton_support import Backend
from reat_fast.parity.rows import GRADIENT, Row, generator, name_of, worst


def compare_convolutions(device: torch.device, backend: Backend) -> Iterator[Row]:
    """Yield the comparisons of every convolution, none where no kernel of ours can run."""
    if backend != "torch" and why_not(device) is None:
        yield from _conv3x3(device)
        yield from _strided(device)


def _conv3x3(device: torch.device) -> Iterator[Row]:
    """Compare the convolution of 3x3."""
    for outputs, dtype in itertools.product((64, 128), (torch.bfloat16, torch.float16)):
        drawn = _maps(device, dtype)
        x, behind = drawn(2, 64, 8, 16), drawn(2, outputs, 8, 16)
        weight, residual = drawn(outputs, 64, 3, 3) / 24, drawn(*behind.shape)
        relu, other = drawn(*x.shape).relu(), drawn(*x.shape)
        expected = F.relu(F.conv2d(x.double(), weight.double(), padding=1) + residual.double())
        error = worst(conv3x3(x, weight, None, residual), expected)
        case, name = f"64 to {outputs} channels", name_of(dtype)
        yield Row("conv3x3", f"{case}, relative", name, error, GRADIENT[dtype])
        leaf = x.double().requires_grad_()
        reached = F.conv2d(leaf, weight.double(), padding=1)
        (gradient,) = torch.autograd.grad(reached, leaf, behind.double())
        expected = torch.where(relu > 0, gradient + other.double(), 0)
        error = worst(conv3x3_gradient(behind, weight, relu, other), expected)
        yield Row("conv3x3", f"{case}, gradient, relative", name, error, GRADIENT[dtype])


def _strided(device: torch.device) -> Iterator[Row]:
    """Compare both ways of a 3x3 convolution of stride 2."""
    for outputs, dtype in itertools.product((64, 128), (torch.bfloat16, torch.float16)):
        drawn = _maps(device, dtype)
        x, behind = drawn(2, 64, 8, 16), drawn(2, outputs, 4, 8)
        weight, shortcut = drawn(outputs, 64, 3, 3) / 24, drawn(outputs, 64, 1, 1) / 8
        relu, other = drawn(*x.shape).relu(), drawn(*x.shape)
        leaf = x.double().requires_grad_()
        reached = F.conv2d(leaf, weight.double(), stride=2, padding=1)
        output, beside = strided_conv(x, weight, None, shortcut)
        assert beside is not None
        case, name = f"64 to {outputs} channels", name_of(dtype)
        error = worst(output, reached.detach().relu())
        yield Row("strided_conv", f"{case}, relative", name, error, GRADIENT[dtype])
        error = worst(beside, F.conv2d(x.double(), shortcut.double(), stride=2))
        yield Row("strided_conv", f"{case}, shortcut, relative", name, error, GRADIENT[dtype])
        (gradient,) = torch.autograd.grad(reached, leaf, behind.double())
        expected = torch.where(relu > 0, gradient + other.double(), 0)
        error = worst(strided_gradient(behind, weight, relu, other), expected)
        yield Row("strided_gradient", f"{case}, relative", name, error, GRADIENT[dtype])


def _maps(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return what draws tensors of a shape, one after another, channels_last."""
    made = generator()

    def drawn(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=made).to(device, dtype)
        return values.contiguous(memory_format=torch.channels_last)

    return drawn

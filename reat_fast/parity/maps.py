"""The ops on the maps inside a network against float64, forwards and backwards."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from reat_fast.kernels.affine_relu import affine_relu_linked
from reat_fast.kernels.batchnorm import fused_batchnorm
from reat_fast.kernels.masked_sum import masked_sum
from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.kernels.triton_support import Backend
from reat_fast.parity.rows import FLOAT32, GRADIENT, Row, generator, name_of, worst


def compare_maps(device: torch.device, backend: Backend) -> Iterator[Row]:
    """Yield the comparisons of every op on maps, one after another as they are made."""
    yield from _masked_sum(device, backend)
    yield from _affine_relu(device, backend)
    yield from _pooled_linear(device, backend)
    yield from _batchnorm(device, backend)


def _masked_sum(device: torch.device, backend: Backend) -> Iterator[Row]:
    for dtype in GRADIENT:
        made = torch.randn(3, 4, 64, 16, 16, generator=generator()).to(device, dtype)
        output, first, second = (t.contiguous(memory_format=torch.channels_last) for t in made)
        output = output.relu()
        expected = torch.where(output > 0, (first.double() + second.double()).to(dtype), 0)
        differing = int((masked_sum(output, first, second, backend=backend) != expected).sum())
        yield Row("masked_sum", "elements that differ", name_of(dtype), differing, 0)


def _affine_relu(device: torch.device, backend: Backend) -> Iterator[Row]:
    scale, shift = torch.randn(2, 160, generator=generator()).to(device)
    wide = [t.double().view(-1, 1, 1) for t in (scale, shift)]
    for dtype, tolerance in GRADIENT.items():
        made = torch.randn(4, 3, 160, 9, 7, generator=generator()).to(device, dtype)
        x, residual, grad, other = (t.contiguous(memory_format=torch.channels_last) for t in made)
        total = x + residual
        before = wide[0] * total.double() + wide[1]
        # Rounding may decide whether a value near zero lets its gradient pass.
        grad = torch.where(before.abs() < 1e-4, 0, grad)
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        given = (leaves[0], scale, shift, leaves[1])
        output, summed = affine_relu_linked(*given, backend=backend)
        gradients = torch.autograd.grad((output, summed), leaves, (grad, other))
        expected = torch.where(before > 0, wide[0] * grad.double(), 0) + other.double()
        name = name_of(dtype)
        error = worst(output.detach(), F.relu(before))
        yield Row("affine_relu", "output, relative", name, error, tolerance)
        differing = int((summed != total).sum())
        yield Row("affine_relu", "sums that differ", name, differing, 0)
        error = max(worst(gradient, expected) for gradient in gradients)
        yield Row("affine_relu", "gradient, relative", name, error, tolerance)


def _pooled_linear(device: torch.device, backend: Backend) -> Iterator[Row]:
    made = generator()
    maps = torch.randn(24, 512, 4, 4, generator=made).relu()
    weight, grad = torch.randn(10, 512, generator=made), torch.randn(24, 10, generator=made)
    for dtype, tolerance in GRADIENT.items():
        x, matrix, behind = (t.to(device, dtype) for t in (maps, weight, grad))
        leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        found = pooled_linear(leaf, matrix, masks_input=True, backend=backend)
        expected = x.double().mean((2, 3)) @ matrix.double().t()
        error, name = worst(found.detach(), expected), name_of(dtype)
        # PyTorch rounds the mean as well.
        yield Row("pooled_linear", "logits, relative", name, error, 2 * tolerance)
        (gradient,) = torch.autograd.grad(found, leaf, behind)
        spread = (behind.double() @ matrix.double())[:, :, None, None] / 16
        error = worst(gradient, torch.where(x > 0, spread, 0))
        yield Row("pooled_linear", "gradient, relative", name, error, 2 * tolerance)


def _batchnorm(device: torch.device, backend: Backend) -> Iterator[Row]:
    for dtype, tolerance in GRADIENT.items():
        if backend == "torch" and dtype != torch.float32:
            continue  # PyTorch rounds the norm before the sum, and the sum again
        made = torch.randn(3, 8, 64, 16, 16, generator=generator()).to(device, dtype)
        x, residual, gradient = (t.contiguous(memory_format=torch.channels_last) for t in made)
        weight, bias, mean, variance = torch.rand(4, 64, generator=generator()).to(device)
        exact = [t.double().requires_grad_() for t in (x, weight, bias, residual)]
        centred = exact[0] - exact[0].mean((0, 2, 3), keepdim=True)
        spread = centred.square().mean((0, 2, 3), keepdim=True)
        wide = [t.view(1, -1, 1, 1) for t in exact[1:3]]
        before = centred * (spread + 1e-5).rsqrt() * wide[0] + wide[1] + exact[3]
        # Rounding may decide whether a value near zero lets its gradient pass.
        gradient = torch.where(before.abs() < 1e-4, 0, gradient)
        expected = [F.relu(before), *torch.autograd.grad(F.relu(before), exact, gradient.double())]
        expected.append(0.75 * variance.double() + 0.25 * x.double().var((0, 2, 3)))
        given = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        statistics = (mean, variance, torch.tensor(0, device=device), 0.25, 1e-5)
        inputs = (given[0], given[1], given[2], *statistics, given[3], True)
        found = fused_batchnorm(*inputs, backend=backend)
        results = [found, *torch.autograd.grad(found, given, gradient), variance]
        names = ("output", "of x", "of weight", "of bias", "of residual", "variance")
        for case, value, wanted in zip(names, results, expected, strict=True):
            allowed = tolerance if value.dtype == dtype else 4 * FLOAT32
            error = worst(value.detach(), wanted.detach())
            yield Row("batchnorm", f"{case}, relative", name_of(dtype), error, allowed)

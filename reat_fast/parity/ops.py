"""Every op against float64, by formulas written without the ops."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast import reference
from reat_fast.engine.augment import PolicyName, apply_policy
from reat_fast.kernels import philox
from reat_fast.kernels.affine_relu import affine_relu_linked
from reat_fast.kernels.batchnorm import fused_batchnorm
from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.class_weights import rbl_weights
from reat_fast.kernels.l2 import l2_step_
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.masked_sum import masked_sum
from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.kernels.prepare import prepare
from reat_fast.kernels.tail_penalty import Form, tail_penalty
from reat_fast.kernels.triton_support import Backend

COUNTS = [4800, 3100, 2000, 1300, 850, 550, 360, 230, 150, 96]
AE_COUNTS = [5200, 2100, 3000, 900, 1250, 0, 640, 31, 1, 314]
EPS, STEP_SIZE = 8 / 255, 2 / 255

# Largest error over the largest exact value. Rounding the inputs is not an error of the op, so
# exact values start from the rounded inputs; what is left is the arithmetic, float32 inside
# (2^-24 = 6e-8 a rounding, some dozens of them), and for gradients the rounding to the input's own
# format: half an ulp, 2^-9 of bfloat16 and 2^-12 of float16 (2^-25 more where it is subnormal).
FLOAT32 = 1e-6
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Row:
    """One comparison: an error in the unit that `case` names, and what it may be at most."""

    op: str
    case: str
    dtype: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the row holds; an error that is not a number does not."""
        return self.error <= self.tolerance


def compare_ops(device: torch.device, backend: Backend) -> Iterator[Row]:
    """Yield the comparisons of every op, one after another as they are made."""
    yield from _random_numbers(device)
    yield from _policies(device, backend)
    yield from _prepare(device, backend)
    yield from _linf_step(device, backend)
    yield from _l2_step(device, backend)
    yield from _masked_sum(device, backend)
    yield from _affine_relu(device, backend)
    yield from _pooled_linear(device, backend)
    yield from _batchnorm(device, backend)
    yield from _class_loss(device, backend)
    yield from _tail_penalty(device, backend)
    yield from _rbl_weights(device)


def _random_numbers(device: torch.device) -> Iterator[Row]:
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123: counter 0, key 0
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    found = [int(word) for word in philox.philox((zero, zero, zero, zero), (zero, zero))]
    wrong = sum(a != b for a, b in zip(found, known, strict=True))
    yield Row("philox", "words unlike Random123's", "uint32", wrong, 0)


def _policies(device: torch.device, backend: Backend) -> Iterator[Row]:
    # The exact one is the PyTorch form on the CPU, one image at a time; tests hold that to Pillow.
    images = torch.randint(0, 256, (24, 32, 32, 3), generator=generator(), dtype=torch.uint8)
    names: tuple[PolicyName, ...] = ("autoaugment", "randaugment")
    for name in names:
        indices = torch.arange(24)
        exact = [apply_policy(images, i, 3, 1, name, backend="torch") for i in indices.split(1)]
        there = (images.to(device), indices.to(device))
        found = apply_policy(*there, 3, 1, name, backend=backend).cpu()
        differing = int((found != torch.cat(exact)).sum())
        yield Row("policy", f"{name}, levels that differ", "uint8", differing, 0)


def _prepare(device: torch.device, backend: Backend) -> Iterator[Row]:
    made = generator()
    images = torch.randint(0, 256, (40, 32, 32, 3), generator=made, dtype=torch.uint8)
    indices = torch.randperm(40, generator=made)[:24]
    on_device = (images.to(device), indices.to(device))
    clean, start = prepare(*on_device, 3, 1, EPS, backend=backend)
    shifts, flips = _augmentation(indices)
    exact = torch.stack(
        [
            _crop_and_flip(images[i], down, right, flip)
            for i, (down, right), flip in zip(indices, shifts, flips, strict=True)
        ]
    )
    differing = int((clean.cpu() != exact.float() / 255).sum())
    yield Row("prepare", "pixels that differ", "float32", differing, 0)
    # noise <= eps and the pixel <= 1 are float32 numbers, their sum is rounded once: 2^-24.
    noise = start.cpu().double() - exact.double() / 255
    words = philox.random_bits(3, 1, indices, philox.START, 32 * 32 * 3)
    expected = (philox.uniform(words).double() * 2 - 1) * EPS
    expected = expected.view(24, 32, 32, 3).permute(0, 3, 1, 2)
    yield Row("prepare", "start, absolute", "float32", worst(noise, expected, 1.0), 2e-7)


def _augmentation(indices: Tensor) -> tuple[list[list[int]], list[bool]]:
    words = philox.random_bits(3, 1, indices, philox.AUGMENT, 3)
    shifts = (philox.integers(words[:, :2], 9) - 4).tolist()
    return shifts, philox.bernoulli(words[:, 2], 0.5).tolist()


def _crop_and_flip(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    height, width, channels = image.shape
    padded = torch.zeros(height + 8, width + 8, channels, dtype=torch.uint8)
    padded[4 : 4 + height, 4 : 4 + width] = image
    crop = padded[4 + down : 4 + down + height, 4 + right : 4 + right + width]
    return (crop.flip(1) if flip else crop).permute(2, 0, 1)


def _linf_step(device: torch.device, backend: Backend) -> Iterator[Row]:
    for dtype in GRADIENT:
        adv, gradient, clean = _attack_tensors(device, dtype)
        expected = adv + STEP_SIZE * gradient.sign().float()
        expected = torch.min(torch.max(expected, clean - EPS), clean + EPS).clamp(0, 1)
        linf_step_(adv, gradient, clean, STEP_SIZE, EPS, backend=backend)
        differing = int((adv != expected).sum())
        yield Row("linf_step", "pixels that differ", name_of(dtype), differing, 0)


def _l2_step(device: torch.device, backend: Backend) -> Iterator[Row]:
    adv, gradient, clean = _attack_tensors(device, torch.float32)
    exact = [t.double().flatten(1) for t in (adv, gradient, clean)]
    moved = exact[0] + 0.2 * F.normalize(exact[1], dim=1, eps=0.0)
    away = moved - exact[2]
    length = away.norm(dim=1, keepdim=True)
    expected = (exact[2] + away * (0.5 / length).clamp(max=1)).clamp(0, 1)
    l2_step_(adv, gradient, clean, 0.2, 0.5, backend=backend)
    error = worst(adv.flatten(1), expected, 1.0)
    yield Row("l2_step", "absolute", "float32", error, FLOAT32)


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


def _attack_tensors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made, shape = generator(), (24, 3, 32, 32)
    clean = torch.rand(shape, generator=made)
    adv = clean + (torch.rand(shape, generator=made) * 2 - 1) * EPS
    gradient = torch.randn(shape, generator=made).to(dtype)
    gradient[:, :, ::7] = 0
    tensors = (t.to(device).contiguous(memory_format=torch.channels_last) for t in (adv, clean))
    adv, clean = tensors
    return adv, gradient.to(device).contiguous(memory_format=torch.channels_last), clean


def _class_loss(device: torch.device, backend: Backend) -> Iterator[Row]:
    made = generator()
    for classes, smoothing in ((10, 0.0), (100, 0.1), (1000, 0.0)):
        batch = 128 if classes < 1000 else 32
        logits = 4 * torch.randn(batch, classes, generator=made)
        labels = torch.randint(0, classes, (batch,), generator=made)
        offsets, weights = torch.rand(2, classes, generator=made) * 5 + 0.1
        for dtype, tolerance in GRADIENT.items():
            rounded = logits.to(dtype)
            exact = rounded.double().requires_grad_()
            expected = F.cross_entropy(
                exact + offsets.double(), labels, weights.double(), label_smoothing=smoothing
            )
            expected.backward()
            fast = rounded.to(device, copy=True).requires_grad_()
            histogram = torch.zeros(classes, dtype=torch.int64, device=device)
            found = class_loss(
                fast,
                labels.to(device),
                offsets=offsets.to(device),
                weights=weights.to(device),
                label_smoothing=smoothing,
                histogram=histogram,
                backend=backend,
            )
            found.backward()
            assert fast.grad is not None and exact.grad is not None
            case, name = f"C={classes}", name_of(dtype)
            error = worst(found.detach(), expected.detach())
            yield Row("class_loss", f"{case} loss, relative", name, error, FLOAT32)
            error = worst(fast.grad, exact.grad)
            yield Row("class_loss", f"{case} gradient, relative", name, error, tolerance)
            predicted = rounded.float().argmax(1).bincount(minlength=classes)
            wrong = int((histogram.cpu() != predicted).sum())
            yield Row("class_loss", f"{case} classes miscounted", name, wrong, 0)


def _tail_penalty(device: torch.device, backend: Backend) -> Iterator[Row]:
    made = generator()
    features = torch.randn(32, 96, generator=made)
    labels = torch.randint(0, 10, (32,), generator=made)
    labels[:3] = torch.tensor([9, 8, 9])
    forms: tuple[Form, ...] = ("official", "pairwise")
    for form in forms:
        for dtype, tolerance in GRADIENT.items():
            rounded = features.to(dtype)
            exact = rounded.double().requires_grad_()
            expected = reference.tail_penalty(exact, labels, COUNTS, form=form)
            expected.backward()
            fast = rounded.to(device, copy=True).requires_grad_()
            found = tail_penalty(
                fast,
                labels.to(device),
                torch.tensor(COUNTS, device=device),
                form=form,
                backend=backend,
            )
            found.backward()
            assert fast.grad is not None and exact.grad is not None
            name = name_of(dtype)
            error = worst(found.detach(), expected.detach())
            case = f"{form}, against the double loop"
            yield Row("tail_penalty", f"{case}, relative", name, error, 4 * FLOAT32)
            error = worst(fast.grad, exact.grad)
            # The official gradient is near 1e-4, where float16 has lost two of its digits.
            loose = 2.0**-9 if dtype == torch.float16 else 2 * tolerance
            yield Row("tail_penalty", f"{form} gradient, relative", name, error, loose)


def _rbl_weights(device: torch.device) -> Iterator[Row]:
    found = rbl_weights(torch.tensor(COUNTS, device=device), torch.tensor(AE_COUNTS, device=device))
    effective = []
    for n, a in zip(COUNTS, AE_COUNTS, strict=True):
        beta = (n - 1) / n
        effective.append(sum(beta**k for k in range(a)))  # the series, free of cancellation
    inverse = torch.tensor([1 / (e + 1e-5) for e in effective], dtype=torch.float64)
    expected = inverse / inverse.sum() * len(COUNTS)
    error = float(((found.cpu().double() - expected) / expected).abs().max())
    yield Row("rbl_weights", "relative, each class", "float32", error, 2.0**-22)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def worst(found: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """Return the largest error over `scale`, which is the largest exact value where it is None."""
    exact = exact.double().cpu()
    error = (found.double().cpu() - exact).abs().max()
    return float(error / (exact.abs().max() if scale is None else scale))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

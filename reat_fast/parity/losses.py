"""The parts of a loss against float64: class loss, tail penalty and weights of the classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from reat_fast import reference
from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.class_weights import rbl_weights
from reat_fast.kernels.tail_penalty import Form, tail_penalty
from reat_fast.kernels.triton_support import Backend
from reat_fast.parity.rows import COUNTS, FLOAT32, GRADIENT, Row, generator, name_of, worst

AE_COUNTS = [5200, 2100, 3000, 900, 1250, 0, 640, 31, 1, 314]


def compare_losses(device: torch.device, backend: Backend) -> Iterator[Row]:
    """Yield the comparisons of every part of a loss, one after another as they are made."""
    yield from _class_loss(device, backend)
    yield from _tail_penalty(device, backend)
    yield from _rbl_weights(device)


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

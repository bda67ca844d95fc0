"""The ops on images against float64: random numbers, augmentation and the steps of an attack."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast.engine.augment import PolicyName, apply_policy
from reat_fast.kernels import philox
from reat_fast.kernels.l2 import l2_step_
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.prepare import prepare
from reat_fast.kernels.triton_support import Backend
from reat_fast.parity.rows import EPS, FLOAT32, GRADIENT, STEP_SIZE, Row, generator, name_of, worst


def compare_images(device: torch.device, backend: Backend) -> Iterator[Row]:
    """Yield the comparisons of every op on images, one after another as they are made."""
    yield from _random_numbers(device)
    yield from _policies(device, backend)
    yield from _prepare(device, backend)
    yield from _linf_step(device, backend)
    yield from _l2_step(device, backend)


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


def _attack_tensors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made, shape = generator(), (24, 3, 32, 32)
    clean = torch.rand(shape, generator=made)
    adv = clean + (torch.rand(shape, generator=made) * 2 - 1) * EPS
    gradient = torch.randn(shape, generator=made).to(dtype)
    gradient[:, :, ::7] = 0
    tensors = (t.to(device).contiguous(memory_format=torch.channels_last) for t in (adv, clean))
    adv, clean = tensors
    return adv, gradient.to(device).contiguous(memory_format=torch.channels_last), clean

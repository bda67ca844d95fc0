"""The L2 step against float64, its norms, and what it does with bad gradients."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from reat_fast.kernels.l2 import _l2_step_, l2_step_
from reat_fast.kernels.triton_support import Backend

Place = tuple[Backend, str]
EPS, STEP = 0.5, 0.125
BLOCK = 512
SHAPES = [(4, 3, 32, 32), (1, 1, 1, 1), (5, 3, 7, 9), (2, 1, 28, 28), (3, 1025), (6,)]
LAYOUTS = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in SHAPES[:4]]


def batch(shape: tuple[int, ...], device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Return adv up to twice the radius away from clean, a gradient and clean."""
    generator = torch.Generator().manual_seed(sum(shape))
    clean = torch.randint(0, 256, shape, generator=generator).to(torch.float32) / 255
    delta = torch.randn(shape, generator=generator).view(shape[0], -1)
    length = 2 * EPS * torch.rand((shape[0], 1), generator=generator)
    delta = delta / delta.norm(dim=1, keepdim=True) * length
    grad = torch.randn(shape, generator=generator)
    return (clean + delta.view(shape)).to(device), grad.to(device), clean.to(device)


def by_hand(
    adv: Tensor, grad: Tensor, clean: Tensor, step: float, eps: float, box: tuple[float, float]
) -> Tensor:
    """Step one sample after the other in float64."""
    rows = []
    for x, g, c in zip(adv.double().cpu(), grad.double().cpu(), clean.double().cpu(), strict=True):
        if g.norm() > 0:
            x = x + step * g / g.norm()
        distance = (x - c).norm()
        if distance > eps:
            x = c + (x - c) * eps / distance
        rows.append(x.clamp(*box))
    return torch.stack(rows)


def tolerance(size: int, step: float, eps: float, block: int = BLOCK) -> float:
    """Bound the float32 error of a pixel.

    Two roundings of the pixel, which lies below 2, and the relative error of either norm: each
    addition of its sum 2**-24, halved by the square root, and a few for square, root and quotient.
    """
    additions = size / block + math.log2(block) + 8
    return 2 * 2.0**-24 * 2 + additions * 2.0**-24 * (step + eps)


@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS)
def test_the_step_is_that_of_float64(
    place: Place, shape: tuple[int, ...], channels_last: bool
) -> None:
    backend, device = place
    adv, grad, clean = batch(shape, device)
    if channels_last:
        adv, grad = (x.to(memory_format=torch.channels_last) for x in (adv, grad))
    expected = by_hand(adv, grad, clean, STEP, EPS, (0.0, 1.0))
    l2_step_(adv, grad, clean, STEP, EPS, backend=backend, block=BLOCK)
    bound = tolerance(math.prod(shape[1:]), STEP, EPS)
    assert (adv.cpu() - expected).abs().max() <= bound


def test_lengths_are_the_step_and_the_radius(place: Place) -> None:
    backend, device = place
    _, grad, clean = batch((4, 3, 16, 16), device)
    free = (float("-inf"), float("inf"))
    adv = clean.clone()
    l2_step_(adv, grad, clean, STEP, EPS, clip=free, backend=backend)
    lengths = (adv - clean).flatten(1).double().norm(dim=1)
    # A pixel below 2 is rounded by 2**-24 at most, 768 of them by 768**0.5 * 2**-24 in length.
    rounding = math.sqrt(768) * tolerance(768, STEP, EPS)
    assert (lengths - STEP).abs().max() <= rounding
    for _ in range(6):
        l2_step_(adv, grad, clean, STEP, EPS, clip=free, backend=backend)
    lengths = (adv - clean).flatten(1).double().norm(dim=1)
    assert (lengths - EPS).abs().max() <= rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_gradient_is_taken_at_its_value(place: Place, dtype: torch.dtype) -> None:
    backend, device = place
    adv, grad, clean = batch((4, 3, 16, 16), device)
    grad = grad.to(dtype)
    expected = by_hand(adv, grad, clean, STEP, EPS, (0.0, 1.0))
    l2_step_(adv, grad, clean, STEP, EPS, backend=backend, block=BLOCK)
    assert (adv.cpu() - expected).abs().max() <= tolerance(768, STEP, EPS)


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_size_of_the_gradient_does_not_matter(place: Place, factor: float) -> None:
    # The squares of these would underflow or overflow in float32.
    backend, device = place
    adv, grad, clean = batch((3, 3, 8, 8), device)
    expected = by_hand(adv, grad * factor, clean, STEP, EPS, (0.0, 1.0))
    l2_step_(adv, grad * factor, clean, STEP, EPS, backend=backend)
    assert (adv.cpu() - expected).abs().max() <= tolerance(192, STEP, EPS)


def test_each_sample_has_its_step_and_radius(place: Place) -> None:
    backend, device = place
    adv, grad, clean = batch((3, 3, 8, 8), device)
    # Every other element: a row need not be dense.
    steps = torch.tensor([0.0, 9.0, 0.3, 9.0, 1.0], device=device)[::2]
    radii = torch.tensor([0.4, 0.0, 2.0], device=device)
    rows = []
    for i, (step, radius) in enumerate(zip(steps.tolist(), radii.tolist(), strict=True)):
        x, g, c = (tensor[i : i + 1] for tensor in (adv, grad, clean))
        rows.append(by_hand(x, g, c, step, radius, (0.0, 1.0)))
    l2_step_(adv, grad, clean, steps, radii, backend=backend)
    assert (adv.cpu() - torch.cat(rows)).abs().max() <= tolerance(192, 1.0, 2.0)
    assert torch.equal(adv[1], clean[1])  # radius zero


@pytest.mark.parametrize("each", ["step", "radius"])
def test_one_of_step_and_radius_may_be_a_number_for_all(place: Place, each: str) -> None:
    backend, device = place
    adv, grad, clean = batch((3, 3, 8, 8), device)
    own = torch.tensor([0.3, 0.0, 1.0], device=device)
    step, radius = (own, EPS) if each == "step" else (STEP, own)
    rows = []
    for i in range(3):
        number, length = (float(torch.as_tensor(x).expand(3)[i]) for x in (step, radius))
        x, g, c = (tensor[i : i + 1] for tensor in (adv, grad, clean))
        rows.append(by_hand(x, g, c, number, length, (0.0, 1.0)))
    l2_step_(adv, grad, clean, step, radius, backend=backend)
    assert (adv.cpu() - torch.cat(rows)).abs().max() <= tolerance(192, 1.0, 1.0)


def test_without_gradient_nothing_moves_inside_the_ball(place: Place) -> None:
    backend, device = place
    _, grad, clean = batch((2, 3, 8, 8), device)
    adv = (clean + 0.01).clamp(0, 1)
    kept = adv.clone()
    l2_step_(adv, torch.zeros_like(grad), clean, STEP, EPS, backend=backend)
    assert torch.equal(adv, kept)
    adv = clean.clone()
    l2_step_(adv, torch.zeros_like(grad), clean, STEP, 0.0, backend=backend)
    assert torch.equal(adv, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_gradients_are_counted_and_stand_for_zero(place: Place, dtype: torch.dtype) -> None:
    backend, device = place
    adv, grad, clean = batch((3, 3, 16, 16), device)
    grad = grad.to(dtype)
    nan, infinity = float("nan"), float("inf")
    flat = grad.view(3, -1)
    flat[0, :3] = torch.tensor([nan, infinity, -infinity])
    flat[1, -1] = nan
    flat[2] = nan
    finite = grad.nan_to_num(0.0, 0.0, 0.0)
    expected = by_hand(adv, finite, clean, STEP, EPS, (0.0, 1.0))
    nonfinite = torch.tensor(1, device=device)
    l2_step_(adv, grad, clean, STEP, EPS, nonfinite=nonfinite, backend=backend, block=BLOCK)
    assert (adv.cpu() - expected).abs().max() <= tolerance(768, STEP, EPS)
    assert nonfinite.item() == 1 + 4 + 768
    l2_step_(adv, finite, clean, STEP, EPS, nonfinite=nonfinite, backend=backend, block=BLOCK)
    assert nonfinite.item() == 1 + 4 + 768


def test_a_bad_pixel_is_not_hidden(place: Place) -> None:
    backend, device = place
    adv, grad, clean = batch((2, 3, 4, 4), device)
    adv[1, 2, 3, 1] = float("nan")
    l2_step_(adv, grad, clean, STEP, EPS, backend=backend)
    assert adv[1, 2, 3, 1].isnan() and adv.isnan().sum() == 1


def test_the_same_step_twice_is_the_same_to_the_bit(place: Place) -> None:
    backend, device = place
    results = []
    for _ in range(2):
        adv, grad, clean = batch((4, 3, 32, 32), device)
        l2_step_(adv, grad, clean, STEP, EPS, backend=backend, block=BLOCK)
        results.append(adv)
    assert torch.equal(*results)


def test_float64_takes_float64_steps(place: Place) -> None:
    backend, device = place
    adv, grad, clean = (tensor.double() for tensor in batch((2, 3, 8, 8), device))
    expected = by_hand(adv, grad, clean, STEP, EPS, (0.0, 1.0))
    l2_step_(adv, grad, clean, STEP, EPS, backend=backend)
    # A few roundings of float64.
    assert (adv.cpu() - expected).abs().max() <= 1e-14


def test_nothing_but_adv_changes(place: Place) -> None:
    backend, device = place
    margin = torch.full((6, 3, 5, 5), float("nan"), device=device)
    adv, grad, clean = batch((2, 3, 5, 5), device)
    margin[2:4] = adv
    copies = grad.clone(), clean.clone()
    l2_step_(margin[2:4], grad, clean, STEP, EPS, backend=backend)
    assert margin[2:4].isfinite().all() and not torch.equal(margin[2:4], adv)
    assert margin[:2].isnan().all() and margin[4:].isnan().all()
    assert torch.equal(grad, copies[0]) and torch.equal(clean, copies[1])


@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    step=st.floats(0, 2, width=32),
    eps=st.floats(0, 2, width=32),
)
def test_any_shape_step_and_radius(
    place: Place, shape: tuple[int, ...], step: float, eps: float
) -> None:
    backend, device = place
    adv, grad, clean = batch(shape, device)
    expected = by_hand(adv, grad, clean, step, eps, (0.0, 1.0))
    l2_step_(adv, grad, clean, step, eps, backend=backend, block=256)
    size = math.prod(shape[1:])
    assert (adv.cpu() - expected).abs().max() <= tolerance(size, step, eps, 256)
    lengths = (adv - clean).reshape(shape[0], -1).double().norm(dim=1)
    assert (lengths <= eps + math.sqrt(size) * tolerance(size, step, eps, 256)).all()


def test_an_empty_batch_is_allowed(place: Place) -> None:
    backend, device = place
    adv, grad, clean = (torch.zeros(0, 3, 4, 4, device=device) for _ in range(3))
    l2_step_(adv, grad, clean, STEP, EPS, backend=backend)


def test_nothing_waits_for_the_device(forbid_syncs: None) -> None:
    adv, grad, clean = batch((2, 3, 4, 4))
    l2_step_(adv, grad, clean, STEP, EPS, nonfinite=torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("count", [True, False])
def test_the_registered_op_keeps_the_rules_of_torch_library(count: bool) -> None:
    adv, grad, clean = batch((2, 3, 4, 4))
    nonfinite = torch.tensor(3) if count else None
    arguments = (adv, grad, clean, torch.tensor(STEP), torch.full((2,), EPS), nonfinite)
    torch.library.opcheck(_l2_step_, (*arguments, 0.0, 1.0, 512))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adv": torch.zeros(2, 3, 4, 4, dtype=torch.float16)}, "adv is torch.float16"),
        ({"grad": torch.zeros(2, 3, 4, 5)}, "grad is"),
        ({"eps": torch.zeros(3)}, "eps has shape"),
        ({"nonfinite": torch.zeros(())}, "nonfinite is torch.float32"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(2, 3, 4, 4) for name in ("adv", "grad", "clean")}
    arguments |= {"step_size": STEP, "eps": EPS} | change
    with pytest.raises(ValueError, match=message):
        l2_step_(**arguments)

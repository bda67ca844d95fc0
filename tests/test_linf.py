"""The sign step against the official lines, to the bit, and what it does with bad gradients."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from reat_fast.kernels.linf import _linf_step_, linf_step_
from reat_fast.kernels.triton_support import Backend

Place = tuple[Backend, str]
EPS, STEP = 8 / 255, 2 / 255
BLOCK = 1024
SHAPES = [(4, 3, 32, 32), (1, 1, 1, 1), (5, 3, 7, 9), (2, 1, 28, 28), (3, 1025), (6,)]
LAYOUTS = [(shape, False) for shape in SHAPES] + [(shape, True) for shape in SHAPES[:4]]


def batch(
    shape: tuple[int, ...], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return adv (partly outside ball and clip), a gradient with zeros, and clean."""
    generator = torch.Generator().manual_seed(sum(shape))
    clean = torch.randint(0, 256, shape, generator=generator).to(dtype) / 255
    adv = clean + 2 * EPS * (2 * torch.rand(shape, generator=generator).to(dtype) - 1)
    grad = torch.randn(shape, generator=generator).to(dtype)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0
    return adv.to(device), grad.to(device), clean.to(device)


def official_step(adv: Tensor, grad: Tensor, clean: Tensor, step_size: float, eps: float) -> Tensor:
    adv = adv.detach() + step_size * torch.sign(grad.detach())
    adv = torch.min(torch.max(adv, clean - eps), clean + eps)
    return torch.clamp(adv, 0.0, 1.0)


@pytest.mark.parametrize(("shape", "channels_last"), LAYOUTS)
def test_the_step_is_the_official_one_to_the_bit(
    place: Place, shape: tuple[int, ...], channels_last: bool
) -> None:
    backend, device = place
    adv, grad, clean = batch(shape, device)
    if channels_last:
        adv, grad, clean = (x.to(memory_format=torch.channels_last) for x in (adv, grad, clean))
    for _ in range(3):
        expected = official_step(adv, grad, clean, STEP, EPS)
        linf_step_(adv, grad, clean, STEP, EPS, backend=backend, block=BLOCK)
        assert torch.equal(adv, expected)
        grad = -grad.roll(1, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_precision_gradient_gives_the_float32_step(place: Place, dtype: torch.dtype) -> None:
    backend, device = place
    adv, grad, clean = batch((4, 3, 32, 32), device)
    grad = grad.to(dtype)
    grad.view(-1)[:2] = torch.tensor([-1e-7, 6e-8])  # the smallest of float16
    expected = official_step(adv, grad.float(), clean, STEP, EPS)
    linf_step_(adv, grad, clean, STEP, EPS, backend=backend, block=BLOCK)
    assert torch.equal(adv, expected)


@pytest.mark.parametrize("formats", [(0, 1, 0), (1, 0, 0), (1, 0, 1), (0, 1, 1)])
def test_mixed_memory_formats_do_not_mix_pixels(place: Place, formats: tuple[int, ...]) -> None:
    backend, device = place
    kinds = (torch.contiguous_format, torch.channels_last)
    adv, grad, clean = (
        tensor.contiguous(memory_format=kinds[kind])
        for tensor, kind in zip(batch((3, 3, 8, 6), device), formats, strict=True)
    )
    expected = official_step(adv, grad, clean, STEP, EPS)
    linf_step_(adv, grad, clean, STEP, EPS, backend=backend)
    assert torch.equal(adv, expected)


def test_each_sample_has_its_step_and_radius(place: Place) -> None:
    backend, device = place
    adv, grad, clean = batch((3, 3, 8, 8), device)
    # Every other element: a row need not be dense.
    steps = torch.tensor([0.0, 9.0, 0.01, 9.0, 0.3], device=device)[::2]
    radii = torch.tensor([0.05, 0.0, 0.1], device=device)
    rows = [
        official_step(adv[i : i + 1], grad[i : i + 1], clean[i : i + 1], steps[i], radii[i])  # type: ignore[arg-type]
        for i in range(3)
    ]
    linf_step_(adv, grad, clean, steps, radii, backend=backend)
    assert torch.equal(adv, torch.cat(rows))
    assert torch.equal(adv[1], clean[1])  # radius zero


@pytest.mark.parametrize("each", ["step", "radius"])
def test_one_of_step_and_radius_may_be_a_number_for_all(place: Place, each: str) -> None:
    backend, device = place
    adv, grad, clean = batch((3, 3, 8, 8), device)
    own = torch.tensor([0.02, 0.0, 0.1], device=device)
    step, radius = (own, EPS) if each == "step" else (STEP, own)
    steps, radii = (torch.as_tensor(x, device=device).expand(3) for x in (step, radius))
    rows = [
        official_step(adv[i : i + 1], grad[i : i + 1], clean[i : i + 1], steps[i], radii[i])  # type: ignore[arg-type]
        for i in range(3)
    ]
    linf_step_(adv, grad, clean, step, radius, backend=backend)
    assert torch.equal(adv, torch.cat(rows))


def test_a_number_a_tensor_and_a_row_of_equal_ones_are_the_same(place: Place) -> None:
    backend, device = place
    results = []
    for wrap in (
        lambda value: value,
        lambda value: torch.tensor(value, device=device),
        lambda value: torch.full((4,), value, device=device),
    ):
        adv, grad, clean = batch((4, 3, 8, 8), device)
        linf_step_(adv, grad, clean, wrap(STEP), wrap(EPS), backend=backend)
        results.append(adv)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bad_gradients_are_counted_and_do_no_harm(place: Place, dtype: torch.dtype) -> None:
    backend, device = place
    adv, grad, clean = batch((2, 3, 32, 32), device)
    nan, infinity = float("nan"), float("inf")
    flat = grad.view(2, -1)
    flat[0, :4] = torch.tensor([nan, infinity, -infinity, 0.0], device=device)
    flat[1, -1] = nan
    signs = torch.nan_to_num(grad, nan=0.0).sign()
    expected = official_step(adv, signs, clean, STEP, EPS)
    nonfinite = torch.tensor(10, device=device)
    linf_step_(
        adv, grad.to(dtype), clean, STEP, EPS, nonfinite=nonfinite, backend=backend, block=BLOCK
    )
    assert torch.equal(adv, expected)
    assert nonfinite.item() == 14
    linf_step_(adv, signs, clean, STEP, EPS, nonfinite=nonfinite, backend=backend, block=BLOCK)
    assert nonfinite.item() == 14


def test_a_bad_pixel_is_not_hidden(place: Place) -> None:
    backend, device = place
    adv, grad, clean = batch((2, 3, 4, 4), device)
    adv[1, 2, 3, 1] = float("nan")
    linf_step_(adv, grad, clean, STEP, EPS, backend=backend)
    assert adv[1, 2, 3, 1].isnan() and adv.isnan().sum() == 1


def test_the_box_may_be_another_one(place: Place) -> None:
    backend, device = place
    adv, grad, clean = batch((2, 3, 4, 4), device)
    free = torch.min(torch.max(adv + STEP * grad.sign(), clean - EPS), clean + EPS)
    for clip in ((0.25, 0.5), (float("-inf"), float("inf"))):
        moved = adv.clone()
        linf_step_(moved, grad, clean, STEP, EPS, clip=clip, backend=backend)
        assert torch.equal(moved, free.clamp(*clip))


def test_float64_takes_float64_steps(place: Place) -> None:
    backend, device = place
    adv, grad, clean = batch((2, 3, 4, 4), device, torch.float64)
    grad *= 1e-60  # float32 has no such numbers, and would see no sign
    expected = official_step(adv, grad, clean, STEP, EPS)
    linf_step_(adv, grad, clean, STEP, EPS, backend=backend)
    assert torch.equal(adv, expected)


def test_nothing_but_adv_changes(place: Place) -> None:
    backend, device = place
    margin = torch.full((6, 3, 5, 5), float("nan"), device=device)
    adv, grad, clean = batch((2, 3, 5, 5), device)
    margin[2:4] = adv
    copies = grad.clone(), clean.clone()
    linf_step_(margin[2:4], grad, clean, STEP, EPS, backend=backend)
    assert torch.equal(margin[2:4], official_step(adv, grad, clean, STEP, EPS))
    assert margin[:2].isnan().all() and margin[4:].isnan().all()
    assert torch.equal(grad, copies[0]) and torch.equal(clean, copies[1])


def test_a_leaf_that_requires_grad_is_stepped_in_place(place: Place) -> None:
    backend, device = place
    adv, grad, clean = batch((2, 3, 4, 4), device)
    expected = official_step(adv, grad, clean, STEP, EPS)
    adv.requires_grad_()
    linf_step_(adv, grad, clean, STEP, EPS, backend=backend)
    assert torch.equal(adv, expected) and adv.is_leaf and adv.requires_grad


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    step=st.floats(0, 0.5, width=32),
    eps=st.floats(0, 0.5, width=32),
)
def test_any_shape_step_and_radius(
    place: Place, shape: tuple[int, ...], step: float, eps: float
) -> None:
    backend, device = place
    adv, grad, clean = batch(shape, device)
    expected = official_step(adv, grad, clean, step, eps)
    linf_step_(adv, grad, clean, step, eps, backend=backend, block=64)
    assert torch.equal(adv, expected)
    # The bounds themselves are rounded: half an ulp of a number below 2.
    assert ((adv - clean).abs() <= eps + 2.0**-23).all()


def test_an_empty_batch_is_allowed(place: Place) -> None:
    backend, device = place
    adv, grad, clean = (torch.zeros(0, 3, 4, 4, device=device) for _ in range(3))
    linf_step_(adv, grad, clean, STEP, EPS, backend=backend)


def test_nothing_waits_for_the_device(forbid_syncs: None) -> None:
    adv, grad, clean = batch((2, 3, 4, 4))
    linf_step_(adv, grad, clean, STEP, EPS, nonfinite=torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("count", [True, False])
def test_the_registered_op_keeps_the_rules_of_torch_library(count: bool) -> None:
    adv, grad, clean = batch((2, 3, 4, 4))
    nonfinite = torch.tensor(3) if count else None
    arguments = (adv, grad, clean, torch.tensor(STEP), torch.full((2,), EPS), nonfinite)
    torch.library.opcheck(_linf_step_, (*arguments, 0.0, 1.0, 512))


def test_three_steps_compile_into_one_graph() -> None:
    def attack(start: Tensor, grad: Tensor, clean: Tensor, nonfinite: Tensor) -> Tensor:
        adv = start.clone()
        for sign in (1, -1, 1):
            torch.ops.reat_fast.linf_step_(
                adv, sign * grad, clean, step, radius, nonfinite, 0.0, 1.0, 512
            )
        return adv

    start, grad, clean = batch((2, 3, 4, 4))
    step, radius = torch.tensor(STEP), torch.tensor(EPS)
    kept = start.clone()
    expected = attack(start, grad, clean, torch.zeros((), dtype=torch.int64))
    nonfinite = torch.zeros((), dtype=torch.int64)
    compiled: Any = torch.compile(attack, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(start, grad, clean, nonfinite), expected)
    assert torch.equal(start, kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adv": torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)}, "adv is torch.bfloat16"),
        ({"clean": torch.zeros(2, 3, 4, 4, dtype=torch.float64)}, "clean is torch.float64"),
        ({"grad": torch.zeros(2, 3, 4, 4, dtype=torch.int64)}, "grad torch.int64"),
        ({"grad": torch.zeros(2, 3, 4, 5)}, "grad is"),
        ({"clean": torch.zeros(1, 3, 4, 4)}, "clean is"),
        ({"adv": torch.zeros(2, 3, 8, 4)[:, :, ::2]}, "strided view"),
        ({"adv": torch.zeros(1, 3, 4, 4).expand(2, 3, 4, 4)}, "strided view"),
        ({"eps": torch.zeros(3)}, "eps has shape"),
        ({"step_size": torch.zeros(2, 1)}, "step_size has shape"),
        ({"nonfinite": torch.zeros(())}, "nonfinite is torch.float32"),
        ({"nonfinite": torch.zeros(1, dtype=torch.int64)}, "nonfinite is"),
        ({"backend": "fast"}, "backend='fast'"),
        ({"eps": torch.zeros((), device="meta")}, "eps is on meta"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {name: torch.zeros(2, 3, 4, 4) for name in ("adv", "grad", "clean")}
    arguments |= {"step_size": STEP, "eps": EPS} | change
    with pytest.raises(ValueError, match=message):
        linf_step_(**arguments)

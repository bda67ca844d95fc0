"""The convolution with resident weights, on a CPU with early and late copies, and on Hopper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gluon_on_cpu import Hopper, emulate
from test_conv3x3 import Drawn, double
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from reat_fast.kernels import resident_conv, resident_conv_gluon
from reat_fast.kernels.conv3x3 import (
    RESIDENT,
    choose_tile,
    conv3x3,
    conv3x3_gradient,
    conv3x3_gradient_torch,
    conv3x3_pays,
    conv3x3_torch,
)

KERNELS = ("_fetch", "_products", "_send_beside", "_finish", "_resident_conv_kernel")
SIZES = [(3, 8, 32), (2, 5, 28), (2, 3, 40), (1, 9, 16), (2, 1, 64)]  # batch, height, width


@pytest.fixture(params=[(a, b) for a in ("early", "late") for b in ("early", "late")])
def hopper(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Hopper:
    """Let the kernel run on CPU tensors, with its copies and products early or late."""
    stand_in = Hopper(*request.param)
    emulate(monkeypatch, resident_conv_gluon, stand_in, KERNELS)
    return stand_in


def launched(drawn: Drawn, gradient: bool, which: list[bool], programs: int) -> tuple[Any, Any]:
    """Return what the kernel makes of some or all operands, and what is right in float64."""
    output = torch.empty_like(drawn.x if gradient else drawn.behind)
    first, second = which
    if gradient:
        relu, other = drawn.relu if first else None, drawn.other if second else None
        given = (drawn.behind, drawn.weight, None, other, relu, output)
        wanted = conv3x3_gradient_torch(*double(drawn.behind, drawn.weight, relu, other))  # type: ignore[arg-type]
    else:
        bias, residual = drawn.bias if first else None, drawn.residual if second else None
        given = (drawn.x, drawn.weight, bias, residual, None, output)
        wanted = conv3x3_torch(*double(drawn.x, drawn.weight, bias, residual))  # type: ignore[arg-type]
    resident_conv.launch_resident_conv(*given, gradient=gradient, programs=programs)
    return output, wanted


@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize("which", [[True, True], [True, False], [False, True], [False, False]])
@pytest.mark.parametrize("gradient", [False, True])
def test_sums_of_integers_are_exact_whenever_copies_come(
    hopper: Hopper, gradient: bool, which: list[bool], programs: int
) -> None:
    drawn = Drawn((3, 64, 64, 7, 32), torch.float16, "cpu", integers=True)
    found, wanted = launched(drawn, gradient, which, programs)
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_every_size_of_images_is_covered(
    hopper: Hopper, size: tuple[int, int, int], gradient: bool
) -> None:
    batch, height, width = size
    drawn = Drawn((batch, 64, 64, height, width), torch.bfloat16, "cpu", integers=True)
    found, wanted = launched(drawn, gradient, [True, True], 2)
    # Integers up to 256 are exact in bfloat16; sums of 576 random signs come to some 25.
    assert float(wanted.abs().max()) <= 256
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("few", [8, 40])
def test_fewer_channels_are_made_of_64(hopper: Hopper, few: int, gradient: bool) -> None:
    channels = (few, 64) if gradient else (64, few)
    drawn = Drawn((2, *channels, 5, 24), torch.float16, "cpu", integers=True)
    found, wanted = launched(drawn, gradient, [True, True], 2)
    assert torch.equal(found.double(), wanted)


def test_nan_passes_and_negative_zero_is_masked(hopper: Hopper) -> None:
    drawn = Drawn((1, 64, 64, 4, 32), torch.float16, "cpu", integers=True)
    drawn.relu[0, 5, 0, 0], drawn.relu[0, 5, 0, 1] = torch.nan, -0.0
    drawn.x[0, 3, 1, 1] = torch.nan
    for gradient in (False, True):
        found, wanted = launched(drawn, gradient, [True, True], 1)
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("copies", "products", "broken"),
    [
        ("late", "early", "wait"),  # does not wait for the boxes
        ("early", "late", "multiplied"),  # does not wait for products before the next boxes
        ("late", "early", "store_wait"),  # writes the next tile over one that is not stored yet
        ("early", "early", "fence"),
        ("early", "early", "later fences"),  # but for that of the barriers
    ],
)
def test_a_kernel_that_does_not_wait_is_found_out(
    monkeypatch: pytest.MonkeyPatch, copies: str, products: str, broken: str
) -> None:
    hopper = Hopper(copies, products)
    if broken == "multiplied":
        monkeypatch.setattr(hopper, broken, lambda num_outstanding, deps: deps[0])
    elif broken == "later fences":
        fences = iter([hopper.fence])
        monkeypatch.setattr(hopper, "fence", lambda: next(fences, lambda: None)())
    else:
        monkeypatch.setattr(hopper, broken, lambda *_: None)
    emulate(monkeypatch, resident_conv_gluon, hopper, KERNELS)
    drawn = Drawn((2, 64, 64, 8, 32), torch.float16, "cpu", integers=True)
    try:
        found, wanted = launched(drawn, False, [True, True], 1)
    except AssertionError:
        return
    assert not torch.equal(found.double(), wanted)


def test_elsewhere_than_on_hopper_the_other_kernel_is_chosen() -> None:
    output = torch.empty(1, 64, 32, 32, device="meta")
    assert not resident_conv.resident_conv_runs_on(output, 64)
    assert not choose_tile(output, 64).resident


@pytest.mark.skipif(not resident_conv_gluon.GLUON_INSTALLED, reason="needs Triton with Gluon")
def test_on_hopper_it_takes_images_of_64_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(capability))
    with FakeTensorMode():
        for width, channels, takes in (
            *((32, 64, True), (28, 64, True), (64, 64, True), (9, 64, True), (8, 64, False)),
            *((65, 64, False), (32, 128, False), (32, 8, True), (32, 3, False)),
        ):
            x = torch.empty(2, 64, 32, width, device="cuda")
            assert resident_conv.resident_conv_runs_on(x, channels) == takes
            assert (choose_tile(x, channels) == RESIDENT) == takes
            assert conv3x3_pays(x, channels) == takes
        capability[0] = 10
        assert not resident_conv.resident_conv_runs_on(
            torch.empty(2, 64, 32, 32, device="cuda"), 64
        )


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.gpu
@pytest.mark.skipif(not on_hopper(), reason="needs a GPU of compute capability 9")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [8, 64])
@pytest.mark.parametrize("size", [*SIZES, (128, 32, 32)])
def test_on_a_gpu_it_is_exact_and_float64_rounded_once(
    size: tuple[int, int, int], inputs: int, dtype: torch.dtype
) -> None:
    batch, height, width = size
    for integers in (True, False):
        drawn = Drawn((batch, inputs, 64, height, width), dtype, "cuda", integers=integers)
        results = []
        if inputs == 64:
            assert choose_tile(drawn.x, 64) == RESIDENT
            given: tuple[Tensor, ...] = (drawn.x, drawn.weight, drawn.bias, drawn.residual)
            results.append((conv3x3(*given), conv3x3_torch(*double(*given))))  # type: ignore[arg-type]
        assert choose_tile(drawn.behind, inputs) == RESIDENT
        given = (drawn.behind, drawn.weight, drawn.relu, drawn.other)
        wanted = conv3x3_gradient_torch(*double(*given))  # type: ignore[arg-type]
        results.append((conv3x3_gradient(*given), wanted))
        # One rounding to the dtype of a sum of float32, of numbers that come to be about 1.
        rtol, atol = (0.0, 0.0) if integers else (torch.finfo(dtype).eps, 1e-5)
        for found, right in results:
            torch.testing.assert_close(found.double(), right, rtol=rtol, atol=atol)

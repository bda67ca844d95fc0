"""The first layer's convolution against float64, and to the bit where sums are exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from reat_fast.kernels.fused_conv import conv_relu_torch
from reat_fast.kernels.stem_conv import stem_conv, stem_conv_runs_on

CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    # x [B, C, H, W], weight [K, C + n, R, S], geometry
    ((3, 3, 9, 7), (64, 8, 3, 3), {"padding": (1, 1)}),
    ((2, 1, 28, 28), (24, 8, 3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    ((2, 3, 8, 8), (16, 3, 1, 1), {}),
    ((1, 2, 11, 6), (100, 2, 5, 5), {"padding": (2, 2)}),
    ((2, 3, 6, 6), (8, 4, 3, 3), {"stride": (3, 3)}),
]


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str, integers: bool = False) -> Tensor:
    values = torch.randint(-2, 3, shape).float() if integers else torch.randn(shape)
    return values.to(device, dtype).contiguous(memory_format=torch.channels_last)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    geometry = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, **options}
    low = [None if tensor is None else tensor.double() for tensor in (x, weight, bias)]
    return conv_relu_torch(*low, None, **geometry)  # type: ignore[arg-type]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "weights", "options"), CASES)
def test_it_is_float64_rounded_once(
    device: str,
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    options: dict[str, Any],
    dtype: torch.dtype,
    with_bias: bool,
) -> None:
    torch.manual_seed(0)
    x, weight = made(shape, dtype, device), made(weights, dtype, device) / 5
    bias = torch.randn(len(weight), device=device).to(dtype) if with_bias else None
    pairs = options.get("stride", (1, 1)), options.get("padding", (0, 0))
    assert stem_conv_runs_on(x, weight, *pairs)
    found, wanted = stem_conv(x, weight, bias, **options), exact(x, weight, bias, options)
    assert found.is_contiguous(memory_format=torch.channels_last)
    # One rounding to the dtype of a sum of float32, of numbers that come to be about 1.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "sliced"])
def test_sums_of_integers_are_exact_in_any_layout(device: str, layout: str) -> None:
    torch.manual_seed(0)
    x = made((5, 3, 9, 8), torch.float16, device, integers=True)
    weight = made((64, 8, 3, 3), torch.float16, device, integers=True)
    bias = torch.arange(-32, 32, 0.5, device=device).half()[::2]
    if layout == "contiguous":
        x = x.contiguous()
    if layout == "sliced":
        room = torch.full((5, 4, 9, 11), torch.nan, device=device, dtype=torch.float16)
        room[:, 1:, :, 2:10] = x
        x = room[:, 1:, :, 2:10]
    found = stem_conv(x, weight, bias, padding=(1, 1))
    assert torch.equal(found.double(), exact(x, weight, bias, {"padding": (1, 1)}))


def test_nan_spreads_as_far_as_the_kernel_reaches(device: str) -> None:
    x = torch.zeros(1, 3, 6, 6, dtype=torch.float16, device=device)
    x[0, 1, 2, 3] = torch.nan
    weight = made((16, 3, 3, 3), torch.float16, device).fill_(1)
    found = stem_conv(x, weight, None, padding=(1, 1))
    wanted = torch.zeros_like(found, dtype=torch.bool)
    wanted[:, :, 1:4, 2:5] = True
    assert torch.equal(found.isnan(), wanted)


def test_what_the_kernel_does_not_take_is_known(device: str) -> None:
    good = made((2, 3, 6, 6), torch.bfloat16, device)
    weight = made((64, 8, 3, 3), torch.bfloat16, device)
    narrow = made((64, 2, 3, 3), torch.bfloat16, device)
    many, large = (made(size, torch.bfloat16, device) for size in ((2, 8, 6, 6), (64, 8, 5, 5)))
    pairs = ((1, 1), (1, 1))
    assert stem_conv_runs_on(good, weight, *pairs)
    for x, w, geometry in (
        (good.float(), weight.float(), pairs),
        (good.half(), weight, pairs),
        (good, weight.contiguous(), pairs),
        (good, narrow, pairs),
        (good, weight, ((1, 2), (1, 1))),
        (good, weight, ((1, 1), (0, 1))),
        (many, weight, pairs),
        (good, large, pairs),
        (good, made((136, 8, 3, 3), torch.bfloat16, device), pairs),
        (good[:0], weight, pairs),
    ):
        assert not stem_conv_runs_on(x, w, *geometry)

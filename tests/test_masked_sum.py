"""Sum and mask in one pass against autograd's two, to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reat_fast.kernels.masked_sum import BLOCK, masked_sum
from reat_fast.kernels.triton_support import Backend

Place = tuple[Backend, str]
SHAPES = [(2, 8, 5, 7), (1, 1, 1, 1), (3, 64, 16, 16), (1, BLOCK, 1, 1), (2, 1, 3, BLOCK)]


def case(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return an output with zeros, negative zeros and NaN, and two gradients."""
    made = torch.Generator().manual_seed(sum(shape))
    output, first, second = torch.randn(3, *shape, generator=made)
    output = output.relu()
    output[torch.rand(shape, generator=made) < 0.1] = -0.0
    output.flatten()[::7] = torch.nan
    first.flatten()[::11] = torch.inf
    return [tensor.to(device, dtype) for tensor in (output, first, second)]


def by_autograd(output: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Let autograd add what two readers of a ReLU send back, and mask it."""
    before = output.detach().clone().requires_grad_()
    active = before.relu()
    return torch.autograd.grad((active, active), before, (first, second))[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_autograds_sum_and_mask_to_the_bit(
    place: Place, shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype
) -> None:
    backend, device = place
    given = case(shape, dtype, device)
    if channels_last:
        given = [tensor.contiguous(memory_format=torch.channels_last) for tensor in given]
    found = masked_sum(*given, backend=backend)
    assert found.stride() == given[0].stride()
    wanted = by_autograd(*given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    again = masked_sum(*given, out=given[1], backend=backend)
    assert again is given[1]
    torch.testing.assert_close(again, wanted, rtol=0, atol=0, equal_nan=True)


def test_one_gradient_is_masked(place: Place) -> None:
    backend, device = place
    output, first, _ = case((2, 8, 6, 6), torch.float32, device)
    wanted = by_autograd(output, first, torch.zeros_like(first))
    for out in (None, first):
        found = masked_sum(output, first, out=out, backend=backend)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_other_layouts_and_no_images_are_taken_too(place: Place) -> None:
    backend, device = place
    output, first, second = case((2, 8, 6, 6), torch.float32, device)
    wanted = by_autograd(output, first, second)
    turned = second.contiguous(memory_format=torch.channels_last)
    spread = first[:, :, :1, :1].expand_as(first)
    found = masked_sum(output, first, turned, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    wanted = by_autograd(output, spread, second)
    found = masked_sum(output, spread, second, backend=backend)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    strided = [tensor[:, ::2] for tensor in (output, first, second)]
    found = masked_sum(*strided, backend=backend)
    torch.testing.assert_close(found, by_autograd(*strided), rtol=0, atol=0, equal_nan=True)
    assert masked_sum(output[:0], first[:0], second[:0], backend=backend).shape == (0, 8, 6, 6)

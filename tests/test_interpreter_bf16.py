"""The repair of bfloat16 in Triton's interpreter: casts round as hardware does, dots are right."""

from __future__ import annotations

import pytest
import torch

from reat_fast.kernels.triton_support import jit, tl

pytestmark = pytest.mark.interpreter


@jit
def _round_kernel(source, target, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    tl.store(target + places, tl.load(source + places).to(tl.bfloat16))


@jit
def _dot_kernel(a, b, c, N: tl.constexpr):  # type: ignore[no-untyped-def]
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    places = rows * N + columns
    tl.store(c + places, tl.dot(tl.load(a + places), tl.load(b + places)))


@jit
def _add_kernel(a, c, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    values = tl.load(a + places)
    tl.store(c + places, values + values)


def test_float32_rounds_to_the_nearest_even_bfloat16() -> None:
    source = torch.randn(4096)
    # A quarter lie halfway between two of them, or a last place of float32 to either side of that.
    bits = source[:1024].view(torch.int32)
    halfway = (bits & ~0xFFFF) + 0x8000 + torch.arange(1024, dtype=torch.int32) % 3 - 1
    source[:1024] = halfway.view(torch.float32)
    target = torch.empty(4096, dtype=torch.bfloat16)
    _round_kernel[(1,)](source, target, N=4096)
    assert torch.equal(target, source.bfloat16())


def test_a_dot_of_bfloat16_is_right() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16()
    c = torch.empty(16, 16)
    _dot_kernel[(1,)](a, b, c, N=16)
    # Exact products, sixteen float32 additions: 16 * 6e-8 of sums below 50.
    torch.testing.assert_close(c.double(), a.double() @ b.double(), rtol=0, atol=5e-5)


def test_arithmetic_that_would_be_rubbish_is_refused() -> None:
    a = torch.ones(16).bfloat16()
    with pytest.raises(Exception, match="bfloat16"):
        _add_kernel[(1,)](a, torch.empty_like(a), N=16)

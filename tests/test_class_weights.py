"""The re-balancing weights, against exact arithmetic and against the published code's float32."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import numpy as np
import pytest
import torch

from reat_fast.kernels.class_weights import rbl_weights

UNIT = 2.0**-24  # half the distance from 1 to the next float32

CASES = {
    "CIFAR-10-LT, ratio 50": (
        [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
        [5100, 3000, 2000, 1500, 800, 700, 300, 250, 50, 1],
    ),
    "a class never predicted": ([500, 20, 5], [525, 0, 0]),
    "no class predicted": ([500, 20, 5], [0, 0, 0]),
    "one sample": ([1, 1, 30], [0, 7, 2]),
    "one class": ([17], [4]),
    "huge counts": ([10**12, 10**6, 3], [10**12, 10**11, 1]),
    "a huge class predicted once": ([10**12, 10**12, 3], [1, 10**12, 2]),
    "counts below one are taken as one": ([0, -3, 10], [2, 0, 5]),
}


def exact_weights(counts: list[int], ae_counts: list[int]) -> list[float]:
    with localcontext() as context:
        context.prec = 60
        inverses = []
        for samples, predicted in zip(counts, ae_counts, strict=True):
            n = Decimal(max(samples, 1))
            beta = (n - 1) / n
            power = beta**predicted if predicted else Decimal(1)
            inverses.append(1 / ((1 - power) * n + Decimal("1e-5")))
        return [float(len(counts) * inverse / sum(inverses)) for inverse in inverses]


@pytest.mark.parametrize("case", CASES)
def test_weights_are_exact_to_float32_rounding(case: str) -> None:
    counts, ae_counts = CASES[case]
    weights = rbl_weights(torch.tensor(counts), torch.tensor(ae_counts))
    assert weights.dtype == torch.float32
    # One rounding to float32; what float64 adds before it is a hundred million times smaller.
    np.testing.assert_allclose(
        weights.double().numpy(), exact_weights(counts, ae_counts), rtol=1.001 * UNIT
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_counts_may_have_any_dtype_that_holds_them(dtype: torch.dtype) -> None:
    counts, ae_counts = CASES["CIFAR-10-LT, ratio 50"]
    expected = rbl_weights(torch.tensor(counts), torch.tensor(ae_counts))
    weights = rbl_weights(torch.tensor(counts, dtype=dtype), torch.tensor(ae_counts, dtype=dtype))
    assert torch.equal(weights, expected)


def published_weights(counts: list[int], ae_counts: list[int]) -> Any:
    """The published formula in numpy float32, rounding where the published code rounds."""
    beta = ((np.array(counts, np.float64) - 1) / np.array(counts)).astype(np.float32)
    one = np.float32(1)
    effective = (one - beta ** np.array(ae_counts, np.float32)) / (one - beta)
    inverse = one / (effective + np.float32(1e-5))
    return inverse / inverse.sum() * np.float32(len(counts))


def published_error(counts: list[int], ae_counts: list[int]) -> Any:
    """Bound the relative error of `published_weights`, to first order.

    beta < 1 is off by UNIT / 2 after rounding. 1 - beta is then exact, so the denominator gives E a
    relative error of n UNIT / 2; beta^a is off by a UNIT / 2 / beta of itself, and by 2 UNIT from
    the power function. Divisions and the sum of the weights add UNIT for each operation.
    """
    n, a = np.array(counts, np.float64), np.array(ae_counts, np.float64)
    beta = (n - 1) / n
    power = beta**a
    numerator = (power * (a * UNIT / 2 / beta + 2 * UNIT) + UNIT) / (1 - power)
    own = numerator + n * UNIT / 2 + 4 * UNIT
    return own + own.max() + (len(counts) + 2) * UNIT


@pytest.mark.parametrize("largest", [500, 5000])
@pytest.mark.parametrize("classes", [10, 100])
def test_weights_agree_with_the_published_float32_arithmetic(classes: int, largest: int) -> None:
    generator = np.random.default_rng(classes + largest)
    counts = [int(largest * 0.02 ** (c / (classes - 1))) for c in range(classes)]
    ae_counts = [int(n * generator.uniform(0.2, 2)) + 1 for n in counts]
    weights = rbl_weights(torch.tensor(counts), torch.tensor(ae_counts)).double().numpy()
    bound = published_error(counts, ae_counts)
    assert bound.max() < 2e-3  # 1.5e-4 from 1 - beta, as much from beta^a, twice: own and the sum's
    difference = np.abs(published_weights(counts, ae_counts) / weights - 1)
    # 1.01: the terms of second order.
    assert (difference <= 1.01 * bound).all()


def test_weights_have_mean_one_and_favour_the_class_seldom_predicted() -> None:
    weights = rbl_weights(torch.tensor([100, 100, 100]), torch.tensor([200, 50, 10]))
    assert weights.mean().item() == pytest.approx(1, rel=4 * UNIT)
    assert weights[0] < weights[1] < weights[2]


def test_counts_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts and ae_counts .* \[3\] and \[2\]"):
        rbl_weights(torch.ones(3), torch.ones(2))

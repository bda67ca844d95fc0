"""What a row of the table is, and the numbers that its comparisons share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

COUNTS = [4800, 3100, 2000, 1300, 850, 550, 360, 230, 150, 96]
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


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def worst(found: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """Return the largest error over `scale`, which is the largest exact value where it is None."""
    exact = exact.double().cpu()
    error = (found.double().cpu() - exact).abs().max()
    return float(error / (exact.abs().max() if scale is None else scale))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

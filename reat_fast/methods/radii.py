"""RobustLT's radii: rare classes are attacked with larger ones, frequent classes with smaller ones.

eps_c = eps ((1 - alpha) + alpha sqrt(ln K_c) / mean sqrt(ln K)), with K_c = n_max / n_c and the
mean over the training images, so that the mean radius over the images stays eps. The step of the
attack scales with the radius. Source: robustlt.py of RobustLT (CVPR 2026).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def class_radius_factors(counts: Sequence[int], alpha: float) -> Tensor:
    """Return eps_c / eps of each class, float64 [K]; counts below 1 are taken as 1.

    Errors: ValueError for alpha outside [0, 1] and for classes of one size, where the formula is
    0 / 0.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"--radius-alpha {alpha:g}: must lie in [0, 1]; RobustLT takes 0.3")
    counts = [int(n) for n in counts]
    if len({max(n, 1) for n in counts}) == 1:
        raise ValueError("--radius class: all classes have the same size; give --radius same")
    sizes = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
    rarity = (sizes.max() / sizes).log().sqrt()
    return 1 - alpha + alpha * rarity / ((sizes / sizes.sum()) * rarity).sum()


class ClassRadii:
    """Say by how much each sample's radius and step differ from the configured ones.

    counts: training images per class. alpha: 0 keeps one radius for all. warmup: epochs over which
    the radii grow from 0, in equal steps from epoch to epoch: RobustLT's beta times the epochs of
    the run. Kept from the official code: the first epoch's radii are 0, so it trains on clean
    images; the random start has the common radius.
    Errors: ValueError as class_radius_factors.
    """

    def __init__(
        self,
        counts: Sequence[int],
        alpha: float,
        warmup: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._factors = class_radius_factors(counts, alpha).to(device, dtype)
        self._warmup = warmup

    def factors(self, labels: Tensor, epoch: Tensor) -> Tensor:
        """Return what radius and step of each sample are multiplied by [B]; may not sync.

        labels: int64 [B]; epoch: 0-dim int64 on the device, the first one 0.
        """
        factors = self._factors[labels]
        if self._warmup <= 0:
            return factors
        return factors * (epoch.to(factors.dtype) / self._warmup).clamp(max=1)

"""What the steps of an epoch add up to: terms of the loss, accuracy, and where a loss broke.

All of it lies on the device and is read by the host once an epoch, so no step waits for a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COUNTS = ("correct", "samples", "steps")
KEPT = ("totals", "nonfinite", "bad_step")


class EpochSums:
    """Add up the steps of an epoch on the device.

    terms: names of the terms of the loss. totals: float64 [1 + T + 3], the loss and its terms
    times their samples, and COUNTS. nonfinite: int64, gradient elements of the attack that were NaN
    or infinite, of all processes. bad_step: int64, the first step of the epoch whose
    loss was not finite, or -1.
    """

    def __init__(self, terms: Sequence[str], device: torch.device) -> None:
        self._names = ("loss", *terms, *COUNTS)
        self.totals = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    def add_(self, loss: Tensor, terms: Tensor, correct: Tensor, samples: Tensor) -> None:
        """Add a step: its loss, and in float64 its terms [T] and two counts; may not sync."""
        first_bad = ~loss.isfinite() & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first_bad, self.totals[-1].long(), self.bad_step))
        means = torch.cat([terms.sum()[None], terms]) * samples
        counts = torch.stack([correct, samples, torch.ones_like(samples)])
        self.totals += torch.cat([means, counts])

    def means(self) -> dict[str, float]:
        """Return the means over samples so far, and adv_accuracy in percent; syncs."""
        sums = dict(zip(self._names, self.totals.tolist(), strict=True))
        samples = max(sums["samples"], 1.0)
        means = {name: sums[name] / samples for name in self._names[: -len(COUNTS)]}
        return {**means, "adv_accuracy": 100 * sums["correct"] / samples}

    def clear_(self) -> None:
        """Begin an epoch."""
        self.totals.zero_()
        self.nonfinite.zero_()
        self.bad_step.fill_(-1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state, into the same memory."""
        for name in KEPT:
            getattr(self, name).copy_(state[name])

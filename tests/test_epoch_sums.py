"""What an epoch adds up to, by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.engine.epoch_sums import EpochSums


def add(sums: EpochSums, terms: list[float], correct: int, samples: int, loss: float = 0.0) -> None:
    numbers = torch.tensor(terms, dtype=torch.float64)
    counts: list[Tensor] = [torch.tensor(n, dtype=torch.float64) for n in (correct, samples)]
    sums.add_(torch.tensor(loss), numbers, *counts)


def test_means_are_over_samples_and_not_over_steps() -> None:
    sums = EpochSums(("bsl", "tail"), torch.device("cpu"))
    assert sums.means() == {"loss": 0, "bsl": 0, "tail": 0, "adv_accuracy": 0}
    add(sums, [1.0, 0.5], 3, 6)
    add(sums, [4.0, 2.0], 1, 2)
    assert sums.means() == {"loss": 2.625, "bsl": 1.75, "tail": 0.875, "adv_accuracy": 50}


def test_the_first_loss_that_is_not_finite_names_its_step() -> None:
    sums = EpochSums(("ce",), torch.device("cpu"))
    found = []
    for loss in (1.0, 2.0, torch.inf, 1.0, torch.nan):
        add(sums, [1.0], 1, 4, loss)
        found.append(int(sums.bad_step))
    assert found == [-1, -1, 2, 2, 2]
    again = EpochSums(("ce",), torch.device("cpu"))
    again.load_state_dict(sums.state_dict())
    assert int(again.bad_step) == 2 and again.means() == sums.means()
    sums.clear_()
    assert int(sums.bad_step) == -1 and not any(sums.means().values())
    add(sums, [1.0], 1, 4, torch.nan)
    assert int(sums.bad_step) == 0

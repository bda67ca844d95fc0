"""Learning rates at the points where they are known."""

from __future__ import annotations

import pytest
import torch

from reat_fast.config import PRESETS, Config
from reat_fast.training.schedule import learning_rate


def test_multistep_is_the_official_scheduler() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 75], gamma=0.1)
    for epoch in range(80):
        for share in (0.0, 0.5, 0.99):
            found = learning_rate(PRESETS["reat"], epoch + share)
            assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_onecycle_rises_to_the_peak_and_falls_to_zero() -> None:
    config = Config(schedule="onecycle", epochs=8, lr=0.4, warmup=0.25)
    rates = [learning_rate(config, progress) for progress in (0, 1, 2, 5, 8)]
    assert rates == pytest.approx([0, 0.2, 0.4, 0.2, 0])


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1.0), (1.0, 0.0)])
def test_onecycle_without_a_ramp_on_one_side(warmup: float, first: float) -> None:
    config = Config(schedule="onecycle", epochs=4, lr=1.0, warmup=warmup)
    rates = [learning_rate(config, progress) for progress in (0, 2, 4)]
    assert rates == pytest.approx([first, 0.5, 0.0])


def test_cosine_and_constant() -> None:
    cosine = Config(schedule="cosine", epochs=4, lr=1.0)
    rates = [learning_rate(cosine, progress) for progress in (0, 2, 4)]
    assert rates == pytest.approx([1, 0.5, 0])
    assert learning_rate(Config(schedule="constant", lr=0.3), 79) == 0.3

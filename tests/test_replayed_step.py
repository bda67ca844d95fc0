"""A step that captures itself: when it does, what it trains, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from made_graphs import replays, step_graphs
from made_step import COUNTS, assert_same_state, assert_same_step, batches, make_model

import reat_fast
from reat_fast.config import Config
from reat_fast.engine import replayed_step
from reat_fast.engine.reference_step import ReferenceStep
from reat_fast.engine.replayed_step import ReplayedStep
from reat_fast.step import TrainStep, make_optimizer

CONFIG = Config(steps=2, lr=0.05, batch_size=8)
__all__ = ["step_graphs"]
pytestmark = pytest.mark.usefixtures("step_graphs")


def make_step(**changes: Any) -> TrainStep:
    model, config = make_model(), dataclasses.replace(CONFIG, **changes)
    return TrainStep(model, make_optimizer(model, config), COUNTS, config)


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replayed_step, "can_capture", lambda device: True)


@pytest.mark.parametrize("changes", [{}, {"attack_from": 1}, {"awp": 0.01, "awp_from": 2}])
def test_it_trains_as_launched_steps_do_whatever_begins_meanwhile(
    changes: dict[str, Any], capturing: None
) -> None:
    launched, captured = make_step(**changes), make_step(**changes)
    replayed = ReplayedStep(captured)
    whole, second, short = batches()
    for _ in range(3):
        for batch in (short, whole, second):
            assert_same_step(launched, replayed, batch)
        assert launched.end_epoch() == captured.end_epoch()
    replayed.forget()
    assert_same_state(launched, captured)
    assert replays.count(8) == 6  # every whole batch, that of the capture included


def test_after_weights_are_loaded_it_captures_again(capturing: None) -> None:
    step, whole = make_step(), batches()[0]
    replayed = ReplayedStep(step)
    replayed.train_on(whole)
    first = replayed._captured
    replayed.forget()
    replayed.forget()
    replayed.train_on(whole)
    assert first is not replayed._captured is not None
    replayed.forget()


def test_elsewhere_steps_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches()[0]
    assert not ReplayedStep(make_step()).captures  # on a CPU
    monkeypatch.setattr(replayed_step, "can_capture", lambda device: True)
    model, config = make_model(), dataclasses.replace(CONFIG, fused=False)
    plain = ReferenceStep(model, make_optimizer(model, config), COUNTS, config)
    for step in (make_step(graph="off"), plain):
        replayed = ReplayedStep(step)
        assert not replayed.captures
        replayed.train_on(whole)
    assert not replays


def test_a_step_that_cannot_be_captured_says_how_to_go_on(
    capturing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(error: Exception) -> Any:
        def capture(*_: object) -> None:
            raise error

        return capture

    monkeypatch.setattr(replayed_step, "CapturedStep", fails(RuntimeError("no\ntrace")))
    with pytest.raises(ValueError, match=r"^--graph auto: .* captured \(no\); go on with --graph"):
        ReplayedStep(make_step()).train_on(batches()[0])
    monkeypatch.setattr(replayed_step, "CapturedStep", fails(torch.OutOfMemoryError("out")))
    with pytest.raises(torch.OutOfMemoryError):  # its cure is another: fewer images
        ReplayedStep(make_step()).train_on(batches()[0])


def test_it_is_found_where_users_look_for_it() -> None:
    assert reat_fast.ReplayedStep is ReplayedStep

"""Times of calls, by a clock and a device that are made up."""

from __future__ import annotations

import pytest
import torch

from bench import timing


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, which a wait for the device moves to when it has done its work."""
    now = [10.0, 0.0]  # what the clock shows, what the device still has to do

    def synchronize(device: torch.device) -> None:
        now[0] += now[1]
        now[1] = 0.0

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    return now


def test_a_call_takes_as_long_as_what_it_gave_the_device(clock: list[float]) -> None:
    def launch() -> str:
        clock[0] += 0.5
        clock[1] += 2.0
        return "launched"

    clock[1] = 100.0  # of earlier calls, which is not in the time
    assert timing.timed(launch, torch.device("cuda")) == (2.5, "launched")
    assert timing.seconds(launch, torch.device("cuda", 1)) == 2.5


def test_a_cpu_is_not_waited_for(clock: list[float]) -> None:
    def count() -> None:
        clock[0] += 0.25

    clock[1] = 100.0
    assert timing.seconds(count, torch.device("cpu")) == 0.25

"""The figures that a run prints, on a clock that the test turns."""

from __future__ import annotations

import pytest

from reat_fast import train
from reat_fast.cli.terminal import duration
from reat_fast.storage.save_pace import SavePace
from reat_fast.training.progress import Progress, TrainingClock


class FakeClock:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.9, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (48 * 3600, "2 d 0 h"),
        (100 * 3600, "4 d 4 h"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_throughput_leaves_out_the_first_step_and_what_is_not_training() -> None:
    now = FakeClock()
    clock = TrainingClock(work=6, clock=now)
    now.seconds += 30
    clock.step(100, 1)
    assert (clock.warm_up_seconds, clock.images_per_second, clock.seconds_left) == (30, 0, 0)
    for _ in range(2):
        now.seconds += 2
        clock.step(100, 1)
    assert clock.images_per_second == pytest.approx(50)
    assert clock.seconds_left == pytest.approx(6)
    now.seconds += 1000  # an evaluation
    clock.resume()
    now.seconds += 2
    clock.step(100, 1)
    assert clock.images_per_second == pytest.approx(50)
    assert clock.seconds_left == pytest.approx(4)
    assert clock.training_seconds == pytest.approx(6)
    clock.work_left = 5  # gone back
    assert clock.seconds_left == pytest.approx(10)
    now.seconds += 3  # the host was ahead of the device, and waited for it
    clock.catch_up()
    assert clock.images_per_second == pytest.approx(300 / 9)


def test_epochs_whose_steps_cost_more_have_their_own_throughput_and_share_of_the_time() -> None:
    now = FakeClock()
    clock = TrainingClock(work=10 * 5 + 10 * 23, clock=now)
    clock.begin_epoch()
    now.seconds += 30
    clock.step(100, 5)
    for _ in range(9):
        now.seconds += 1
        clock.step(100, 5)
    assert clock.images_per_second == pytest.approx(100)
    assert clock.seconds_left == pytest.approx(10 * 23 / 5)
    clock.begin_epoch()
    assert clock.images_per_second == 0
    for _ in range(5):
        now.seconds += 4
        clock.step(100, 23)
    assert clock.images_per_second == pytest.approx(25)
    pace = (9 * 1 + 5 * 4) / (9 * 5 + 5 * 23)
    assert clock.seconds_left == pytest.approx(5 * 23 * pace)


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = FakeClock()
    clock = TrainingClock(4, now)
    progress = Progress(2, clock, terminal=False, now=now)
    means = {"loss": 1.25, "adv_accuracy": 40.0}
    for _ in range(2):
        now.seconds += 40
        clock.step(64, 1)
        progress.step(1, means if progress.due() else None)
    progress.epoch(1, means, "  robust 30.0 %")
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "epoch 1/2 under way  loss 1.2500  adv 40.0 %  2 images/s  left 1 min 20 s",
        "epoch 1/2  loss 1.2500  adv 40.0 %  2 images/s  left 1 min 20 s  robust 30.0 %",
    ]


def test_what_is_not_known_after_the_first_step_is_not_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = FakeClock()
    clock = TrainingClock(3, now)
    progress = Progress(3, clock, terminal=False, now=now)
    now.seconds += 9
    clock.step(64, 1)
    progress.epoch(1, {"loss": 1.25, "adv_accuracy": 40.0})
    assert capsys.readouterr().out == "epoch 1/3  loss 1.2500  adv 40.0 %\n"


def test_a_terminal_gets_a_bar_with_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    now = FakeClock()
    clock = TrainingClock(2, now)
    progress = Progress(1, clock, terminal=True, now=now)
    now.seconds += 1
    clock.step(8, 1)
    progress.step(1, None)
    now.seconds += 1
    clock.step(8, 1)
    assert progress.due()
    progress.step(1, {"loss": 0.5, "adv_accuracy": 99.0})
    progress.close()
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown and "100 %" in shown
    assert "loss 0.5000  adv 99.0 %  8 images/s  left 0 s" in shown


def test_the_bar_goes_by_what_steps_cost(capsys: pytest.CaptureFixture[str]) -> None:
    now = FakeClock()
    clock = TrainingClock(5 + 23 + 2, now)
    progress = Progress(1, clock, terminal=True, now=now)
    for work in (5, 23):
        now.seconds += 2
        clock.step(8, work)
        progress.step(1, {"loss": 0.5, "adv_accuracy": 99.0})
    progress.close()
    shown = capsys.readouterr().err
    assert " 17 %" in shown and " 93 %" in shown  # 5 and 28 of 30


def test_a_run_saves_so_often_that_saving_takes_a_twentieth_of_its_time() -> None:
    now = FakeClock()
    pace = SavePace(clock=now)
    assert pace.affordable()  # nothing is known yet
    with pace.saving():
        now.seconds += 0.5
    assert pace.age == 0
    now.seconds += 9.9
    assert not pace.affordable()
    now.seconds += 0.2
    assert pace.affordable() and pace.age == pytest.approx(10.1)
    with pace.saving():
        now.seconds += 0.1  # which is cheap on any account
    assert pace.affordable()


def test_a_save_that_fails_is_not_taken_for_one() -> None:
    now = FakeClock()
    pace = SavePace(clock=now)
    with pytest.raises(OSError), pace.saving():
        now.seconds += 5
        raise OSError
    assert pace.age == 5 and pace.affordable()


def test_saving_counts_neither_as_training_nor_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = FakeClock()
    clock = TrainingClock(work=3, clock=now)
    for seconds in (30, 2):
        now.seconds += seconds
        clock.step(100, 1)

    class Saved:
        def save(self) -> None:
            now.seconds += 50

    def waits(run: object) -> None:
        now.seconds += 0.5  # the device still has something to do

    monkeypatch.setattr(train, "refuse_nonfinite", waits)
    monkeypatch.setattr(train, "refuse_nonfinite_weights", lambda run: None)
    train.save(Saved(), clock)  # type: ignore[arg-type]
    now.seconds += 0.25
    clock.waited()
    now.seconds += 1
    clock.step(100, 1)
    assert clock.training_seconds == pytest.approx(2 + 0.5 + 1.25)
    assert clock.waiting_seconds == pytest.approx(0.25)

"""A run that was killed and resumed ends with the bits of one that never stopped."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_run import SMALL, differences, kill_and_resume, run_once
from made_run import run

from reat_fast import checkpoint, train
from reat_fast.checkpoint import CHECKPOINT, PREVIOUS
from reat_fast.engine.distributed import World
from reat_fast.engine.stopping import Stopped, StopRequest
from reat_fast.env import environment
from reat_fast.storage.save_pace import SavePace
from reat_fast.training import faults, selection
from reat_fast.training import run as run_module
from reat_fast.training.logs import MetricLog
from reat_fast.training.run import Run


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Compute as the killed runs do: with another number of threads sums have another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def saved_each_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after each epoch, however slow the disk is just now."""
    monkeypatch.setattr(SavePace, "affordable", lambda pace: True)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_once(data, folder) == 0
    return folder


def test_where_saving_costs_too_much_a_run_goes_on_from_further_back(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, finish_epoch = tmp_path / "run", Run.finish_epoch

    def broken_off(self: Run, *rows: dict[str, Any]) -> None:
        finish_epoch(self, *rows)
        if self.epoch == 2:
            raise SystemExit(137)

    def saved() -> tuple[int, bool]:
        epoch = checkpoint.load_checkpoint(folder / CHECKPOINT)["epoch"]
        return epoch, (folder / "last.safetensors").exists()

    arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", folder]
    with monkeypatch.context() as patched:
        patched.setattr(SavePace, "affordable", lambda pace: False)
        with patched.context() as broken:
            broken.setattr(Run, "finish_epoch", broken_off)
            with pytest.raises(SystemExit):
                run(*arguments)
        assert saved() == (0, False)
        assert len((folder / "metrics.csv").read_text().splitlines()) == 3
        assert run("--resume", folder) == 0
    assert saved() == (3, True)  # the last epoch is saved in any case
    assert differences(whole, folder) == []


@pytest.mark.parametrize("saved", [0, 1])
def test_a_resumed_run_shows_no_epoch_that_it_is_about_to_train_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int
) -> None:
    folder, finish_epoch = tmp_path / "run", Run.finish_epoch

    def broken_off(self: Run, *rows: dict[str, Any]) -> None:
        monkeypatch.setattr(SavePace, "affordable", lambda pace: self.epoch <= saved)
        finish_epoch(self, *rows)
        if self.epoch == 2:
            raise SystemExit(137)

    def shown() -> list[int]:
        tables = [folder / name for name in ("metrics.csv", "timing.csv")]
        return [len(t.read_text().splitlines()) - 1 if t.exists() else 0 for t in tables]

    monkeypatch.setattr(SavePace, "affordable", lambda pace: False)
    monkeypatch.setattr(Run, "finish_epoch", broken_off)
    arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--evaluation", "none"]
    with pytest.raises(SystemExit):
        run(*arguments, "--run-dir", folder)
    assert shown() == [2, 2]
    monkeypatch.setattr(train, "train", lambda *_: sys.exit(137))
    with pytest.raises(SystemExit):
        run("--resume", folder)
    assert shown() == [saved, saved]


def test_what_is_saved_before_an_evaluation_are_the_last_weights_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where evaluations are short, a save before each leaves none affordable after it.
    folder, finish_epoch = tmp_path / "run", Run.finish_epoch
    dear: list[bool] = []

    def broken_off(self: Run, *rows: dict[str, Any]) -> None:
        dear.append(True)
        finish_epoch(self, *rows)
        dear.clear()
        if self.epoch == 2:
            raise SystemExit(137)

    monkeypatch.setattr(SavePace, "affordable", lambda pace: not dear)
    monkeypatch.setattr(Run, "finish_epoch", broken_off)
    with pytest.raises(SystemExit):
        run(*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", folder)
    state = checkpoint.load_checkpoint(folder / CHECKPOINT)
    assert (state["epoch"], state["batch"]) == (1, 8)
    saved, last = (
        checkpoint.load_model(folder / name).state_dict()
        for name in (CHECKPOINT, "last.safetensors")
    )
    assert all(torch.equal(saved[name], last[name]) for name in last)


def test_the_best_weights_are_those_that_are_told_where_a_run_goes_back(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, finish_epoch, evaluate = tmp_path / "run", Run.finish_epoch, selection.evaluate
    figures = [20.0, 30.0, 10.0, 10.0]  # a GPU need not give the second epoch its bits again
    kept: list[bytes] = []

    def evaluated(*arguments: Any, **named: Any) -> dict[str, Any]:
        result = evaluate(*arguments, **named)
        if "pgd10" in result["attacks"]:
            result["attacks"]["pgd10"].update(overall=figures[0], balanced=figures.pop(0))
        return result

    def broken_off(self: Run, *rows: dict[str, Any]) -> None:
        finish_epoch(self, *rows)
        if self.epoch == 2:
            raise SystemExit(137)
        kept.append((folder / "best.safetensors").read_bytes())

    monkeypatch.setattr(selection, "evaluate", evaluated)
    monkeypatch.setattr(SavePace, "affordable", lambda pace: not kept)
    arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", folder]
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Run, "finish_epoch", broken_off)
        run(*arguments, "--schedule", "constant")
    assert run("--resume", folder) == 0 and not figures
    assert json.loads((folder / "evaluation.json").read_text())["weights_epoch"] == 1
    assert [(folder / "best.safetensors").read_bytes()] == kept


@pytest.mark.slow
def test_twenty_kills_at_random_moments_leave_no_trace(
    data: Path, whole: Path, tmp_path: Path
) -> None:
    kills, runs = kill_and_resume(data, tmp_path, kills=20, seed=1)
    assert kills >= 20
    for number in range(1, runs + 1):
        assert differences(whole, tmp_path / f"run-{number}") == []


def test_a_run_killed_before_its_first_step_begins_again_with_the_same_command(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()  # all that is there when a kill comes before the first file
    for write in range(4):  # what describes the run, then the checkpoint of its beginning
        assert run("--resume", folder) == 2
        assert f"begin it with --run-dir {folder}" in capsys.readouterr().err
        assert run_once(data, folder, die_in_write=write) == -signal.SIGKILL
        assert not checkpoint.has_checkpoint(folder)
    assert run(*SMALL, "--data", data, "--run-dir", folder) == 0
    assert differences(whole, folder) == []


def test_a_run_killed_before_it_saved_a_step_goes_on_from_its_beginning(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(train, "train", killed)
        assert run(*SMALL, "--data", data, "--run-dir", folder) == 130
    assert run(*SMALL, "--data", data, "--run-dir", folder) == 2  # no second run in its place
    assert run("--resume", folder) == 0
    assert differences(whole, folder) == []


class StopAfter(StopRequest):
    """Ask to stop after so many steps, as a signal would."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self._left = steps

    def agreed(self, step: int) -> bool:
        self._left -= 1
        if self._left == 0:
            self._signal = signal.SIGTERM
        return super().agreed(step)


@pytest.mark.parametrize("steps", [1, 7, 8, 9])
def test_a_run_stopped_between_two_steps_goes_on_at_the_next(
    data: Path, whole: Path, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(train, "StopRequest", lambda world: StopAfter(steps))
        assert run(*SMALL, "--data", data, "--run-dir", folder) == 128 + signal.SIGTERM
    state = checkpoint.load_checkpoint(folder / CHECKPOINT)
    assert (state["epoch"], state["batch"]) == divmod(steps, 8) if steps != 8 else (0, 8)
    saved, last = (
        checkpoint.load_model(folder / name).state_dict()
        for name in (CHECKPOINT, "last.safetensors")
    )
    assert all(torch.equal(saved[name], last[name]) for name in last)
    assert run("--resume", folder) == 0
    assert differences(whole, folder) == []


@pytest.mark.parametrize("affordable", [True, False])
def test_a_run_stopped_in_an_evaluation_goes_on_with_it(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, affordable: bool
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(SavePace, "affordable", lambda pace: affordable)

    def interrupted(*_: object, **__: object) -> None:
        raise Stopped(143)

    with monkeypatch.context() as patched:
        patched.setattr(selection, "evaluate", interrupted)
        arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", folder]
        assert run(*arguments) == 143
    state = checkpoint.load_checkpoint(folder / CHECKPOINT)
    assert (state["epoch"], state["batch"]) == (0, 8)
    assert run("--resume", folder) == 0
    assert differences(whole, folder) == []


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_an_interrupt_while_a_command_is_starting_shows_no_traceback(
    command: str, tmp_path: Path
) -> None:
    # A module that is imported at the start waits there, for as long as the real ones may.
    (tmp_path / "tyro.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)")
    paths = [str(tmp_path), str(Path(checkpoint.__file__).parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    words = [sys.executable, "-m", f"reat_fast.{command}", "x"]
    given: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # Tests that run in the background ignore SIGINT, and what they start does.
    given["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(words, env=environment, text=True, cwd=tmp_path, **given) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert errors == "stopped\n" and process.returncode in (-signal.SIGINT, 130)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(
    data: Path, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, "--data", str(data), "--epochs", "2000", "--run-dir", str(folder)]
    command = [sys.executable, "-m", "reat_fast.train", *arguments, "--loader", "workers"]
    group = {"start_new_session": True}  # the signal meets the run's workers too
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **group) as process:  # type: ignore[call-overload]
        deadline = time.monotonic() + 120
        while not (folder / "metrics.csv").exists():  # an epoch later there are workers
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"go on with: python -m reat_fast.train --resume {folder}" in error
    assert "Traceback" not in error
    assert checkpoint.load_checkpoint(folder / CHECKPOINT)["metrics"] is not None


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    data: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*SMALL, "--data", data, "--run-dir", folder) == 0
    newest = (folder / CHECKPOINT).read_bytes()
    (folder / CHECKPOINT).write_bytes(newest[: len(newest) // 2])
    assert run("--resume", folder) == 0
    error = capsys.readouterr().err
    assert (
        f"{folder / CHECKPOINT}: damaged" in error and f"going on from {folder / PREVIOUS}" in error
    )
    assert differences(whole, folder) == []


def test_resume_auto_takes_the_newest_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("--resume", "auto") == 2
    assert "no run with a checkpoint in runs" in capsys.readouterr().err
    for _ in range(2):
        assert run(*SMALL, "--data", data, "--epochs", 1) == 0
    (Path("runs") / "reat-2" / "evaluation.json").unlink()
    assert run("--resume", "auto") == 0
    assert (Path("runs") / "reat-2" / "evaluation.json").exists()


def test_a_second_process_is_kept_out_of_a_run_folder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reat_fast.training.run_folder import FolderLock

    folder = tmp_path / "run"
    assert run(*SMALL, "--data", data, "--epochs", 1, "--run-dir", folder) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lock = FolderLock(folder)
    assert run("--resume", folder) == 2
    assert "another process is training in this folder" in capsys.readouterr().err
    lock.release()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert run("--resume", folder) == 0


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps, counted over the whole process, whose loss becomes NaN."""
    steps: list[int] = []
    taken = 0
    take_step = Run.take_step

    def faulty(self: Run, batch: object) -> None:
        nonlocal taken
        taken += 1
        if taken in steps:
            with torch.no_grad():
                next(self.model.parameters()).fill_(float("nan"))
        take_step(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "take_step", faulty)
    return steps


@pytest.mark.usefixtures("saved_each_epoch")
def test_a_loss_that_is_not_finite_names_its_step_and_keeps_the_good_checkpoint(
    data: Path, tmp_path: Path, nan_at: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    nan_at.append(12)
    arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", folder]
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert "the loss is not finite in epoch 2, step 4" in error
    assert f"the state before it is in {folder / CHECKPOINT}" in error
    state = checkpoint.load_checkpoint(folder / CHECKPOINT)
    assert (state["epoch"], state["batch"]) == (1, 0)
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.usefixtures("saved_each_epoch")
def test_an_update_that_overflows_in_the_last_step_is_not_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = Run.take_step

    def overflowing(self: Run, batch: object) -> None:
        take_step(self, batch)  # type: ignore[arg-type]
        if (self.epoch, self.batch) == (1, self.batches):
            with torch.no_grad():
                next(self.model.parameters())[0] = float("inf")

    monkeypatch.setattr(Run, "take_step", overflowing)
    folder = tmp_path / "run"
    arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", folder]
    assert run(*arguments) == 1
    error = capsys.readouterr().err
    assert "the state of the network is not finite in epoch 2, step 8" in error
    state = checkpoint.load_checkpoint(folder / CHECKPOINT)
    assert (state["epoch"], state["batch"]) == (1, 0)
    for name in ("best", "last"):
        model = checkpoint.load_model(folder / f"{name}.safetensors")
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_the_seconds_of_an_epoch_are_those_of_all_processes_that_worked_on_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, take_step = tmp_path / "run", Run.take_step

    def slow(self: Run, batch: object) -> None:
        time.sleep(0.25)
        take_step(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "take_step", slow)
    with monkeypatch.context() as patched:
        patched.setattr(train, "StopRequest", lambda world: StopAfter(6))
        assert run(*SMALL, "--data", data, "--run-dir", folder) == 128 + signal.SIGTERM
    assert run("--resume", folder) == 0
    with (folder / "timing.csv").open(newline="") as table:
        first, second, _ = csv.DictReader(table)
    for row in (first, second):
        assert float(row["seconds"]) >= 8 * 0.25
    # Each process leaves its first step out, which is where a step is captured.
    assert float(first["training_seconds"]) >= 6 * 0.25


def test_the_seconds_of_a_save_are_in_the_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint = checkpoint.save_checkpoint

    def slow(folder: Path, state: dict[str, Any]) -> None:
        if state["epoch"] == 1 and state["batch"] == 0:
            time.sleep(2)
        save_checkpoint(folder, state)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    arguments = [*SMALL, "--data", data, "--evaluation", "none", "--save-minutes", "60"]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    with (tmp_path / "run" / "timing.csv").open(newline="") as table:
        beside = [
            float(row["seconds"]) - float(row["training_seconds"]) for row in csv.DictReader(table)
        ]
    assert beside[1] >= 2 > beside[2]  # after the first epoch, so in the row of the second


def test_a_fault_of_free_training_names_the_batch_and_not_the_update(
    data: Path, tmp_path: Path, nan_at: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    nan_at.append(3)
    free = ["--attack", "free", "--replays", "4", "--run-dir", tmp_path / "run"]
    assert run(*SMALL, "--data", data, *free) == 1
    assert "the loss is not finite in epoch 1, step 3:" in capsys.readouterr().err


@pytest.mark.parametrize("affordable", [True, False])
def test_rollback_goes_on_from_the_last_epoch_at_half_the_rate(
    data: Path,
    tmp_path: Path,
    nan_at: list[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    affordable: bool,
) -> None:
    monkeypatch.setattr(SavePace, "affordable", lambda pace: affordable)
    folder, logged, epoch = tmp_path / "run", [], MetricLog.epoch

    def noting(self: MetricLog, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        logged.append(metrics["epoch"])
        epoch(self, metrics, timing)

    monkeypatch.setattr(MetricLog, "epoch", noting)
    nan_at.append(20)
    arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", folder]
    quiet = [argument for argument in arguments if argument != "--quiet"]
    assert run(*quiet, "--schedule", "constant", "--on-nonfinite", "rollback") == 0
    shown = capsys.readouterr().out
    assert "with the learning rate times 0.5" in shown
    # Steps that are taken again are left again.
    assert "left -" not in shown and re.search(r"epoch 3/3 .* left 0", shown)
    rates = [row["lr"] for row in checkpoint.load_checkpoint(folder / CHECKPOINT)["metrics"]]
    assert rates == [0.05, 0.05, 0.025]
    assert logged == [1, 2, 3]  # logs take no step twice


@pytest.mark.usefixtures("saved_each_epoch")
def test_rollback_gives_up_where_it_does_not_help(
    data: Path, tmp_path: Path, nan_at: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    nan_at.extend(range(12, 1000))
    arguments = [*SMALL, "--data", data, "--save-minutes", "60", "--run-dir", tmp_path / "run"]
    loud = [argument for argument in arguments if argument != "--quiet"]
    assert run(*loud, "--on-nonfinite", "rollback") == 1
    shown = capsys.readouterr()
    assert "the loss is not finite in epoch 2, step 1" in shown.err
    tried = re.findall(r"with the learning rate times (\S+)", shown.out)
    assert [float(factor) for factor in tried] == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32]
    assert 1 / faults.SMALLEST_SCALE == 32


def test_running_out_of_memory_says_what_to_lower(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(Run, "take_step", too_much)
    assert run(*SMALL, "--data", data, "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "lower --eval-batch-size (now" in error
    assert "--batch-size (now 8)" in error and "--accumulate (now 1)" in error
    assert error.count("\n") == 1


def test_a_batch_larger_than_the_data_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*SMALL, "--data", data, "--batch-size", 63, "--run-dir", tmp_path / "run"]
    assert run(*arguments) == 2
    assert "--batch-size 63: the training set has 62 images" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_the_program_at_once(
    first: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = False
    with StopRequest() as stop:
        os.kill(os.getpid(), first)
        assert stop.asked and stop.agreed(1)
        with contextlib.suppress(KeyboardInterrupt):  # which would end the tests
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may say it twice
            twice = True
        assert twice, "the step was not let to its end"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert ("press Ctrl-C again to stop at once" in capsys.readouterr().err) == (first == 2)


def test_a_closed_terminal_ends_a_run_that_nohup_does_not_keep(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = signal.getsignal(signal.SIGHUP)
    try:
        for kept in (False, True):
            signal.signal(signal.SIGHUP, signal.SIG_IGN if kept else signal.SIG_DFL)
            with StopRequest() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.asked == (not kept)
            assert kept or stop.stopped().code == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err == "stopping as soon as this is saved\n"


def test_code_that_changed_since_the_run_was_begun_is_named_even_where_all_is_quiet(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*SMALL, "--data", data, "--epochs", 1, "--run-dir", folder) == 0
    assert run("--resume", folder) == 0
    assert capsys.readouterr().err == ""
    described = {**environment(), "torch": "9.9", "commit": "abc"}
    monkeypatch.setattr(run_module, "environment", lambda: described)
    assert run("--resume", folder) == 0
    error = capsys.readouterr().err
    assert error.startswith("changed since the run was begun: commit ")
    assert error.endswith(f" -> abc, torch {environment()['torch']} -> 9.9\n")


def test_another_number_of_processes_which_rounds_otherwise_is_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*SMALL, "--data", data, "--epochs", 1, "--run-dir", folder) == 0
    state = checkpoint.load_checkpoint(folder / CHECKPOINT)
    for said, processes in (("changed since the run was begun: processes 2 -> 1\n", 2), ("", None)):
        state["code"]["processes"] = processes
        if processes is None:
            del state["code"]["processes"]  # as in older runs
        checkpoint.save_checkpoint(folder, state)
        assert run("--resume", folder) == 0
        assert capsys.readouterr().err == said


def test_processes_stop_at_the_same_step() -> None:
    with StopRequest(World(0, 2)) as stop:
        assert not any(stop.agreed(step) for step in range(1, 10))  # nobody is asked in between

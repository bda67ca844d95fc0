"""Sweeps: lines are checked first, runs stand alone, a sweep goes on, and the table is right."""

from __future__ import annotations

import csv
import json
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import made_npz
from made_sweep import SMALL, command, run_here, run_with

from reat_fast.checkpoint import CHECKPOINT
from reat_fast.config import PRESETS, parse
from reat_fast.data import load_run_data
from reat_fast.evaluation.saved import weights_sha256
from reat_fast.sources import download
from reat_fast.storage.config_file import from_json, to_json
from reat_fast.training import sweep_programs, sweep_runs
from reat_fast.training.run_folder import FolderLock, epochs_done
from reat_fast.training.sweep_lines import read_lines
from reat_fast.training.sweep_runs import make_runs


def write_run(folder: Path, clean: float, pgd20: float | None, **changes: Any) -> None:
    """Write what a finished run leaves that a sweep reads."""
    figures = {"clean": {"overall": clean, "tail": clean / 2}}
    if pgd20 is not None:
        figures["pgd20"] = {"overall": pgd20, "tail": pgd20 / 2}
    protocol = {"dataset": "made", "samples": 24, "eps": 8 / 255, "step_size": 2 / 255}
    evaluation = {**protocol, "weights_epoch": 1, "attacks": figures} | changes
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "timing.csv").write_text("epoch,seconds\n1,10.0\n2,20.5\n")
    machine = {"commit": "0123abc", "cpu": "Made CPU", "cpu_cores": 2, "gpus": []}
    (folder / "env.json").write_text(
        json.dumps({**machine, "torch": "2.8" if clean < 72 else "2.9"})
    )


class Trainer:
    """Stands for `python -m reat_fast.train`: writes a run folder, or fails as it is told to."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.codes: dict[str, int] = {}

    def __call__(self, command: Sequence[str]) -> int:
        assert list(command[:3]) == [sys.executable, "-m", "reat_fast.train"]
        words = list(command[3:])
        self.commands.append(words)
        resumed = words[0] == "--resume"
        folder = Path(words[1] if resumed else words[words.index("--run-dir") + 1])
        code = self.codes.pop(folder.name, 0)
        folder.mkdir(parents=True, exist_ok=True)
        if not resumed:
            _, config = parse(words, "")
            (folder / "config.json").write_text(to_json(config))
        epochs = from_json((folder / "config.json").read_text()).epochs
        torch.save({"epoch": epochs if code == 0 else 1}, folder / "checkpoint-last.pt")
        if code == 0:
            seed = int(words[words.index("--seed") + 1])
            write_run(folder, clean=70.0 + seed, pgd20=30.0 + 2 * seed)
        return code

    @property
    def names(self) -> list[str]:
        """The folders of the runs that were started, in order."""
        return [Path(words[1 if words[0] == "--resume" else -1]).name for words in self.commands]


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    stand_in = Trainer()
    run_with(stand_in, monkeypatch)
    return stand_in


@pytest.fixture
def presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two lines on a CIFAR-10 that is there, as far as can be told without reading it."""
    (tmp_path / "sets" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setenv("REAT_FAST_DATA", str(tmp_path / "sets"))
    file = tmp_path / "presets.txt"
    file.write_text("# what is compared\n\nreat  # as it is\nshort: reat --epochs 2 --lr 0.2\n")
    return file


def test_every_line_runs_with_every_seed_and_is_summed_up(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(presets, "--seeds", 0, 1, 2, "--out", out) == 0
    assert trainer.names == [f"{name}-seed{k}" for name in ("reat", "short") for k in range(3)]
    assert trainer.commands[4] == [
        *("reat", "--epochs", "2", "--lr", "0.2", "--seed", "1"),
        *("--run-dir", str(out / "short-seed1")),
    ]
    # 70, 71, 72: mean 71, sample deviation 1; 30, 32, 34: mean 32, deviation 2; tails half of it.
    summary = (out / "summary.md").read_text()
    cells = [cell.strip() for cell in summary.splitlines()[3].strip("|").split("|")]
    assert cells == [
        *("short", "3 of 3", "made", "24", "8/255"),
        *("71.00 ± 1.00", "35.50 ± 0.50", "32.00 ± 2.00", "16.00 ± 1.00", "30 ± 0"),
    ]
    train = "python -m reat_fast.train reat --epochs 2 --lr 0.2 --seed 0"
    assert f"    # short, seeds 0 1 2\n    {train}\n" in summary
    assert summary.splitlines()[3] in capsys.readouterr().out
    with (out / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["reat", "short"]
    assert (rows[1]["command"], rows[1]["seeds"], rows[1]["planned"]) == (train, "0 1 2", "3")
    assert float(rows[0]["pgd20_tail_mean"]) == 16 and float(rows[0]["pgd20_tail_std"]) == 1
    assert float(rows[0]["seconds_mean"]) == 30.5
    assert (rows[0]["device"], rows[0]["torch"]) == ("Made CPU 2 cores", "2.8; 2.9")
    assert rows[0]["commit"] == "0123abc"


def test_a_failed_run_does_not_end_the_sweep_and_is_named(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    trainer.codes = {"reat-seed1": 3}
    assert command(presets, "--seeds", 0, 1, "--out", out) == 1
    assert trainer.names[-1] == "short-seed1"
    assert "1 of 4 runs failed: reat-seed1 (exit code 3)" in capsys.readouterr().err
    assert "| 1 of 2 |" in (out / "summary.md").read_text()


def test_failed_runs_are_named_in_the_order_of_the_file_whichever_ended_first(
    presets: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ended = threading.Event()

    class Failing:
        """The first of two programs ends after the second."""

        def __init__(self, command: Sequence[str], log: Path, environment: object) -> None:
            self.first = "--epochs" not in command
            log.write_text(f"error: {log.stem}\n")

        def wait(self) -> int:
            if self.first:
                ended.wait()
                time.sleep(0.2)
                return 3
            ended.set()
            return 4

    monkeypatch.setattr(sweep_programs, "begin", Failing)
    assert command(presets, "--out", tmp_path / "out", "--jobs", 2) == 1
    assert capsys.readouterr().err.splitlines() == [
        "[2/2] short-seed0: exit code 4: error: short-seed0",
        "[1/2] reat-seed0: exit code 3: error: reat-seed0",
        "2 of 2 runs failed: reat-seed0 (exit code 3), short-seed0 (exit code 4)",
    ]


def test_a_second_sweep_on_one_folder_is_refused_while_the_first_goes_on(
    presets: Path,
    tmp_path: Path,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (presets, "--out", tmp_path / "out")
    second: list[int] = []

    def train(program: Sequence[str]) -> int:
        capsys.readouterr()
        second.extend((command(*arguments), command(*arguments, "--dry-run")))
        shown = capsys.readouterr()
        assert shown.err == (
            f"error: --out {tmp_path / 'out'}: another sweep is at work there; wait for it, or "
            "name another folder\n"
        )
        assert len(shown.out.splitlines()) == 2  # of the dry run, which changes nothing
        return trainer(program)

    run_with(train, monkeypatch)
    assert command(*arguments) == 0 and second == [2, 0] * 2
    assert trainer.names == ["reat-seed0", "short-seed0"]
    assert not list((tmp_path / "out").glob("*.lock"))
    assert command(*arguments) == 0  # it has let go


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_that_another_process_trains_is_left_to_it_and_named(
    jobs: int,
    presets: Path,
    tmp_path: Path,
    trainer: Trainer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    trainer.codes = {"reat-seed0": 143}
    assert command(presets, "--out", out) == 143
    (out / "reat-seed0.log").write_text("epoch 20/40  loss 1.2\n")
    capsys.readouterr()
    trainer.commands.clear()
    held = FolderLock(out / "reat-seed0")
    assert command(presets, "--out", out, "--jobs", jobs) == 1
    assert trainer.names == ["short-seed0"]
    assert capsys.readouterr().err.splitlines() == [
        f"[1/2] reat-seed0: {out / 'reat-seed0'} is still being trained by another process; wait "
        "for it and start the sweep again",
        "1 of 2 runs failed: reat-seed0 (exit code 2)",
    ]
    held.release()
    assert command(presets, "--out", out, "--jobs", jobs) == 0


@pytest.mark.parametrize("code", [130, 143])  # as SIGINT and SIGTERM end a run
def test_the_same_command_goes_on_where_a_sweep_was_stopped(
    code: int,
    presets: Path,
    tmp_path: Path,
    trainer: Trainer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    trainer.codes = {"reat-seed1": code}
    arguments = (presets, "--seeds", 0, 1, "--out", out)
    assert command(*arguments) == code
    error = capsys.readouterr().err
    again = " ".join(map(str, arguments))
    assert error == f"stopped; go on with: python -m reat_fast.sweep {again}\n"
    assert trainer.names == ["reat-seed0", "reat-seed1"]
    trainer.commands.clear()
    assert command(*arguments) == 0
    assert trainer.names == ["reat-seed1", "short-seed0", "short-seed1"]
    assert trainer.commands[0] == ["--resume", str(out / "reat-seed1"), "--seed", "1"]
    trainer.commands.clear()
    assert command(*arguments) == 0
    assert trainer.commands == []


def test_a_run_that_was_evaluated_before_its_end_goes_on(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    folder = out / "reat-seed0"
    trainer.codes = {folder.name: 130}
    assert command(presets, "--out", out) == 130
    last = folder / "last.safetensors"
    last.write_bytes(b"weights of epoch 1")
    of_now = {"weights": last.name, "weights_sha256": weights_sha256(last)}
    whole = {"epoch": PRESETS["reat"].epochs}
    for half_way, told in (
        (True, {"weights_epoch": 1}),  # tested at its end, and resumed for more epochs
        (False, {"weights_sha256": "of earlier weights"}),
        (False, {}),
    ):
        write_run(folder, 99.0, 98.0, **(of_now | told))
        if not told:
            evaluation = json.loads((folder / "evaluation.json").read_text())
            evaluation.pop("weights_epoch")  # as python -m reat_fast.evaluate leaves it
            (folder / "evaluation.json").write_text(json.dumps(evaluation))
        torch.save({"epoch": 1} if half_way else whole, folder / "checkpoint-last.pt")
        trainer.commands.clear()
        trainer.codes = {folder.name: 3}
        assert command(presets, "--out", out) == 1
        assert trainer.names[0] == folder.name and trainer.commands[0][0] == "--resume"
        table = (out / "summary.md").read_text()
        assert "0 of 1" in table and "99.00" not in table
    capsys.readouterr()
    write_run(folder, 70.0, 30.0, **of_now)
    torch.save(whole, folder / "checkpoint-last.pt")
    assert command(presets, "--out", out) == 0
    assert "reat-seed0: finished" in capsys.readouterr().out
    (folder / "checkpoint-last.pt").unlink()  # to save space
    assert command(presets, "--out", out) == 0
    assert "reat-seed0: finished" in capsys.readouterr().out


def test_the_epochs_of_a_run_on_a_gpu_are_known_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"epoch": 3, "model": {"weight": torch.zeros(2)}}, tmp_path / CHECKPOINT)
    assert epochs_done(tmp_path) == 3


def test_attacks_are_added_in_the_arithmetic_of_those_that_are_there(
    presets: Path, tmp_path: Path
) -> None:
    lines, out = read_lines(presets), tmp_path / "out"
    write_run(out / "reat-seed0", 70.0, 30.0, precision="bf16")  # on a GPU, say
    (out / "reat-seed0" / "config.json").write_text(to_json(PRESETS["reat"]))
    for subset in (None, 12):
        run = make_runs(lines[:1], [0], out, subset=subset)[0]
        words = run.evaluation(["fgsm"])
        assert words[words.index("--precision") + 1] == "bf16"
    run = make_runs(lines[:1], [0], out, precision="float32")[0]
    words = run.evaluation(["fgsm"])
    assert words[words.index("--precision") + 1] == "float32"


@pytest.mark.parametrize("left", ["config.json", "config.json.part", "checkpoint-last.pt.part"])
def test_a_run_ended_before_its_first_step_begins_again(
    left: str, presets: Path, tmp_path: Path, trainer: Trainer
) -> None:
    folder = tmp_path / "out" / "reat-seed0"
    folder.mkdir(parents=True)
    (folder / left).write_text(to_json(PRESETS["reat"]))
    assert command(presets, "--out", tmp_path / "out") == 0
    assert trainer.commands[0][-2:] == ["--run-dir", str(folder)]


def test_what_would_be_lost_or_mixed_up_is_refused_before_the_first_run(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(presets, "--out", out) == 0
    trainer.commands.clear()
    presets.write_text("reat\nshort: reat --epochs 2 --lr 0.3\n")
    assert command(presets, "--out", out) == 2
    refused = capsys.readouterr().err
    assert f"presets.txt:2: --lr is 0.3, but {out / 'short-seed0'} was begun with 0.2" in refused

    presets.write_text("other: reat\n")
    foreign = out / "other-seed0"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    assert command(presets, "--out", out) == 2
    assert "holds no run of this sweep" in capsys.readouterr().err
    (foreign / "config.json").write_text(to_json(PRESETS["reat"]))
    (foreign / "best.safetensors").touch()
    assert command(presets, "--out", out) == 2
    assert "has weights but no checkpoint" in capsys.readouterr().err
    (foreign / "best.safetensors").unlink()
    assert command(presets, "--out", out) == 2
    assert "other-seed0: holds files but no checkpoint" in capsys.readouterr().err
    assert (foreign / "thesis.tex").exists()
    assert trainer.commands == []


def test_what_is_put_into_a_folder_that_waits_for_its_run_is_not_deleted(
    presets: Path, tmp_path: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = tmp_path / "out" / "short-seed0"
    waiting.mkdir(parents=True)

    def put(program: Sequence[str]) -> int:
        if not trainer.commands:  # while another run trains
            (waiting / "notes.txt").touch()
        return trainer(program)

    run_with(put, monkeypatch)
    assert command(presets, "--out", waiting.parent) == 0
    assert (waiting / "notes.txt").exists()


def test_a_dry_run_lists_and_writes_nothing(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_run(out / "reat-seed0", 70.0, 30.0)
    (out / "reat-seed0" / "config.json").write_text(to_json(PRESETS["reat"]))
    assert command(presets, "--out", out, "--dry-run") == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"finished  {out / 'reat-seed0'} is kept"
    assert second.startswith("new       python -m reat_fast.train reat --epochs 2 --lr 0.2 --seed")
    assert trainer.commands == [] and not (out / "summary.md").exists()


def test_a_dry_run_lists_the_commands_of_the_same_call(
    presets: Path,
    tmp_path: Path,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train_or_evaluate(program: Sequence[str]) -> int:
        if program[2] == "reat_fast.train":
            return trainer(program)
        file = Path(program[3]) / "evaluation.json"
        told = json.loads(file.read_text())
        file.write_text(json.dumps(told | {"attacks": told["attacks"] | {"fgsm": {}}}))
        return 0

    run_with(train_or_evaluate, monkeypatch)
    out = tmp_path / "out"
    trainer.codes = {"short-seed0": 143}
    assert command(presets, "--out", out) == 143
    capsys.readouterr()
    arguments = (presets, "--out", out, "--seeds", 0, 1, "--attacks", "fgsm")
    assert command(*arguments, "--dry-run") == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed[::2]] == ["finished", "new", "begun", "new"]
    assert listed.pop(0) == f"finished  {out / 'reat-seed0'} is kept"
    assert command(*arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    ran = [line.partition(": ")[2] for line in shown if ": python -m " in line]
    assert ran[0] == listed[0].strip()
    for line, one in zip(listed, ran, strict=True):  # then follow conditions of a run's own test
        assert one.startswith(line[10:])
    assert command(*arguments, "--dry-run") == 0
    assert capsys.readouterr().out.count(" is kept\n") == 4


def test_a_dry_run_names_a_run_that_another_process_trains(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    trainer.codes = {"reat-seed0": 143}
    assert command(presets, "--out", out) == 143
    capsys.readouterr()
    held = FolderLock(out / "reat-seed0")
    assert command(presets, "--out", out, "--attacks", "fgsm", "--dry-run") == 0
    held.release()
    first, *others = capsys.readouterr().out.splitlines()
    assert first == f"held      {out / 'reat-seed0'} is still being trained by another process"
    assert [line.split()[0] for line in others] == ["new", "python"]


def test_the_data_of_all_lines_may_be_named_once(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", tmp_path / "moved.npz"
    assert command(presets, "--out", out, "--data", data) == 2
    assert f"--data {data}: no such file or folder" in capsys.readouterr().err
    data.touch()
    trainer.codes = {"short-seed0": 143}
    assert command(presets, "--out", out, "--data", data) == 143
    assert command(presets, "--out", out, "--data", data) == 0  # where it lies changes no run
    named = [words[words.index("--data") + 1] for words in trainer.commands]
    assert named == [str(data)] * 3 and trainer.commands[2][0] == "--resume"
    summary = (out / "summary.md").read_text()
    assert f"    python -m reat_fast.train reat --seed 0 --data {data}\n" in summary
    assert command(presets, "--out", out) == 0  # finished runs need none, their commands do
    assert (out / "summary.md").read_text() == summary


def test_the_command_of_a_row_is_quoted_for_a_shell(
    presets: Path, tmp_path: Path, trainer: Trainer
) -> None:
    out, data = tmp_path / "out", tmp_path / "my data's.npz"
    data.touch()
    assert command(presets, "--out", out, "--data", data, "--seeds", 3, 1) == 0
    with (out / "summary.csv").open(newline="") as file:
        row = next(csv.DictReader(file))
    words = ["python", "-m", "reat_fast.train", "reat", "--seed", "3", "--data", str(data)]
    assert shlex.split(row["command"]) == words and row["seeds"] == "3 1"
    pasted = (out / "summary.md").read_text().split("    # reat, seeds 3 1\n")[1].splitlines()[0]
    assert pasted == f"    {row['command']}"


def test_runs_of_other_images_are_not_taken_for_those_of_the_data_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(run_here, monkeypatch)
    data, other = made_npz(tmp_path / "made.npz"), tmp_path / "other.npz"
    arrays = dict(np.load(data))
    np.savez(other, **(arrays | {"x_train": 255 - arrays["x_train"]}))  # labels and sizes agree
    file, out = tmp_path / "lines.txt", tmp_path / "out"
    file.write_text(f"small: reat {SMALL}\n")
    assert command(file, "--out", out, "--data", data) == 0
    summary = (out / "summary.md").read_text()
    assert f"--seed 0 --data {data}\n" in summary
    moved = data.rename(tmp_path / "moved.npz")
    few = made_npz(tmp_path / "few.npz", train=2)
    capsys.readouterr()
    for named, flags in ((other, []), (few, []), (other, ["--dry-run"])):
        assert command(file, "--out", out, "--data", named, "--seeds", 1, 0, *flags) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and shown.err == (
            f"error: {file}:1: --data {named}: its training images are not those that "
            f"{out / 'small-seed0'} was begun with; name another --out, or the data that it had\n"
        )
        assert not (out / "small-seed1").exists()
    assert command(file, "--out", out, "--data", moved) == 0
    assert "small-seed0: finished" in capsys.readouterr().out
    # The command names the data that the runs were given last, for where it was there is none.
    assert (out / "summary.md").read_text() == summary.replace(str(data), str(moved))
    other.rename(data)  # written anew under the path that the run has
    assert command(file, "--out", out, "--data", data) == 2
    assert "its training images are not those" in capsys.readouterr().err
    moved.write_bytes(b"PK")
    assert command(file, "--out", out, "--data", moved) == 2
    assert capsys.readouterr().err.startswith(f"error: {file}:1: ")


def test_the_path_tells_data_apart_where_a_run_does_not_tell_its_images(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data, other = tmp_path / "out", tmp_path / "a.npz", tmp_path / "b.npz"
    for file in (data, other):
        file.touch()
    assert command(presets, "--out", out, "--data", data) == 0
    trainer.commands.clear()
    assert command(presets, "--out", out, "--data", tmp_path / "sets" / ".." / "a.npz") == 0
    assert command(presets, "--out", out, "--data", other) == 2
    assert f"--data {other}: its training images are not those" in capsys.readouterr().err
    assert trainer.commands == []


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_data_that_is_missing_is_named_with_its_line_before_anything_runs(
    flags: list[str],
    presets: Path,
    tmp_path: Path,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert command(presets, "--out", out) == 0
    trainer.commands.clear()
    monkeypatch.setattr(download, "search_folders", lambda _: [tmp_path / "empty"])
    assert command(presets, "--out", out, *flags) == 0  # finished runs need none
    presets.write_text("reat\nnew: reat\n")
    assert command(presets, "--out", out, *flags) == 2
    error = capsys.readouterr().err
    assert f"{presets}:2: cifar10 not found in {tmp_path / 'empty'}" in error
    assert error.count("\n") == 1 and trainer.commands == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("reet", "1: unknown preset 'reet'"),
        ("reat\n\nb: reat --lrr 1", "3: "),
        ("reat --lr -1", "1: --lr -1"),
        ("reat --dataset foo", "1: --dataset foo: is unknown; give one of cifar10"),
        ("reat --dataset npz", "1: dataset npz needs --data FILE.npz"),
        ("reat --image-size 8", "1: --image-size: the images of cifar10 have one size already"),
        ("reat --seed 3", "1: --seed: leave it out"),
        ("reat --run-dir=x", "1: --run-dir=x: leave it out"),
        ("reat --help", "1: --help: leave it out"),
        ("--lr 0.1", "1: name a preset first"),
        ("long:", "1: name a preset first"),
        ("../up: reat", "1: '../up' cannot be a name"),
        ("a b: at --epochs 1", "1: 'a b' cannot be a name; use letters, digits and . _ + -"),
        (": reat", "1: '' cannot be a name"),
        ("foo --epochs 1", "1: unknown preset 'foo' (presets: reat, "),
        ("reat --model foo", "1: --model foo: is unknown; give one of resnet8"),
        ("reat\nreat --lr 0.2", "2: {file}:1 is called reat too; put another name"),
        ("reat --data 'open", "1: No closing quotation"),
        ("# nothing", ": names no run"),
    ],
)
def test_bad_lines_are_named_before_anything_runs(
    text: str,
    named: str,
    presets: Path,
    tmp_path: Path,
    trainer: Trainer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    presets.write_text(text)
    assert command(presets, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert named.format(file=presets) in error and error.count("\n") == 1
    assert trainer.commands == [] and not (tmp_path / "out").exists()


def test_an_unknown_attack_is_refused_before_anything_runs(
    presets: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(presets, "--attacks", "pgd20", "square") == 2
    assert "unknown attack 'square'" in capsys.readouterr().err and not trainer.commands


def test_a_damaged_evaluation_is_named(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(presets, "--out", out) == 0
    whole = json.loads((out / "reat-seed0" / "evaluation.json").read_text())
    for text in ("[]", "[" * 100_000, json.dumps(whole | {"step_size": "2/255"})):
        (out / "reat-seed0" / "evaluation.json").write_text(text)
        assert command(presets, "--out", out, "--attacks", "aa") == 2
        assert "evaluation.json: damaged or not an evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seeds", "named"),
    [
        (["1", "1"], "--seeds: give at least one, and each once"),
        ([], "--seeds: give at least one, and each once"),
        (["-1"], "--seeds -1: must lie in [0, 2^63)"),
    ],
)
def test_seeds_that_cannot_be_are_refused(
    seeds: list[str], named: str, presets: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(presets, "--seeds", *seeds) == 2
    assert capsys.readouterr().err == f"error: {named}\n"


def test_a_file_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "is a folder").mkdir()
    for name in ("absent.txt", "binary", "is a folder"):
        assert command(tmp_path / name) == 2
        error = capsys.readouterr().err
        assert name in error and "Errno" not in error and error.count("\n") == 1


def test_evaluations_under_other_conditions_are_not_averaged(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(presets, "--seeds", 0, 1, "--out", out) == 0
    write_run(out / "reat-seed1", 70.0, None)
    assert command(presets, "--seeds", 0, 1, "--out", out) == 0
    assert "30.00 (n = 1)" in (out / "summary.md").read_text()
    for name, value, shown in (
        ("samples", 12, "12, the other seeds with 24"),
        ("eps", 4 / 255, "4/255, the other seeds with 8/255"),
        ("restarts", 5, "5, the other seeds with 1"),
        ("images_sha256", "0123456789abcdef", "0123456789ab, the other seeds with unset"),
    ):
        step = {"step_size": value / 4} if name == "eps" else {}  # or it is tested again
        write_run(out / "reat-seed1", 70.0, 30.0, **{name: value}, **step)
        assert command(presets, "--seeds", 0, 1, "--out", out) == 2
        assert f"evaluated with {name} {shown}; evaluate it again" in capsys.readouterr().err
    (out / "reat-seed1" / "evaluation.json").write_text("{}")
    assert command(presets, "--seeds", 0, 1, "--out", out) == 2
    assert "evaluation.json: damaged" in capsys.readouterr().err


def test_a_run_that_was_tested_by_the_steps_of_its_training_is_tested_again(
    presets: Path, tmp_path: Path, trainer: Trainer
) -> None:
    out = tmp_path / "out"
    assert command(presets, "--seeds", 0, "--out", out) == 0
    folder = out / "reat-seed0"
    told = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps({**told, "step_size": 3 / 255}))
    trainer.commands.clear()
    assert command(presets, "--seeds", 0, "--out", out) == 0
    assert [words[:2] for words in trainer.commands] == [["--resume", str(folder)]]


def test_a_folder_that_cannot_be_written_is_named_before_anything_runs(
    presets: Path, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tmp_path / "out" / "summary.md"
    summary.mkdir(parents=True)
    for out, message in [
        (presets, f"--out {presets}: is a file; name a folder"),
        (summary.parent, f"{summary}: cannot be written (is a folder; name a file)"),
    ]:
        assert command(presets, "--out", out) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert trainer.commands == []


@pytest.mark.parametrize("attack", ["aa", "aa-package"])
def test_autoattack_on_data_of_few_classes_is_refused_before_a_run_is_trained(
    attack: str, tmp_path: Path, trainer: Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [made_npz(tmp_path / f"{n}.npz", classes=n) for n in (4, 3)]
    file, out = tmp_path / "sets.txt", tmp_path / "out"
    file.write_text("".join(f"{d.stem}: reat {SMALL} --data {d}\n" for d in sets))
    assert command(file, "--out", out, "--attacks", "pgd10", attack) == 2
    told = f"error: {file}:2: --attacks: AutoAttack's targeted loss needs 4 classes, the model"
    assert capsys.readouterr().err.startswith(told)
    assert trainer.commands == [] and not out.exists()


def test_the_classes_of_data_are_read_once_and_not_of_a_run_that_was_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read = made_npz(tmp_path / "made.npz"), []
    file = tmp_path / "sets.txt"
    file.write_text(f"a: reat {SMALL} --data {data}\nb: reat {SMALL} --data {data}\nc: reat\n")
    monkeypatch.setattr(
        sweep_runs,
        "load_run_data",
        lambda *a, **b: read.append(b["path"]) or load_run_data(*a, **b),
    )
    monkeypatch.setattr(sweep_runs, "find_dataset", lambda *_: None)
    runs = make_runs(read_lines(file), [0, 1], tmp_path / "out")
    sweep_runs.refuse_autoattack_on_few_classes(runs)
    assert read == [data]
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "split.json").write_text(json.dumps({"train_counts": [4, 3]}))
    with pytest.raises(ValueError, match=r"sets.txt:1: .* needs 4 classes, the model has 2"):
        sweep_runs.refuse_autoattack_on_few_classes(runs)
    assert read == [data]

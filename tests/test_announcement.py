"""What a run says before its first step, of its attack, its network and flags that do not act."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_data import made_images
from made_run import SMALL, run
from PIL import Image

from reat_fast import checkpoint
from reat_fast.training import gauge
from reat_fast.training.announcement import announce
from reat_fast.training.plan import make_plan
from reat_fast.training.run import Run


def test_free_training_says_what_its_attack_is_and_nothing_of_another(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "reat",
        *SMALL,
        "--data",
        data,
        "--epochs",
        1,
        "--attack",
        "free",
        "--tail",
        "none",
    ]
    assert run(*arguments, "--replays", 2, "--run-dir", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "attack: free, along the gradient of training itself, 2 updates on each batch" in shown
    assert "RBL" not in shown and "tail penalty" not in shown


def test_an_average_that_is_never_reached_and_a_file_taken_for_cifar10_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, labels = np.random.default_rng(0), np.arange(100) % 10
    images = made.integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    data = tmp_path / "mine.npz"
    np.savez(data, x_train=images, y_train=labels, x_test=images[:20], y_test=labels[:20])
    arguments = ["at", *SMALL, "--dataset", "cifar10", "--data", data, "--epochs", 1]
    assert run(*arguments, "--ema", 0.9, "--run-dir", tmp_path / "run") == 0
    shown = capsys.readouterr().out
    assert "mine.npz is read as cifar10; data of your own needs --dataset npz" in shown
    assert "--ema 0.9: acts after 81 steps, this run has" in shown


@pytest.mark.parametrize(("share", "said"), [("0.25", "25 %"), ("0", "none")])
def test_images_to_choose_by_that_are_not_read_are_named(
    share: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    for part, label in itertools.product(("train", "val", "test"), (0, 1)):
        folder = tmp_path / "mine" / part / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(pixels[label]).save(folder / f"{number}.png")
    given = [*SMALL, "--dataset", "folder", "--data", str(tmp_path / "mine"), "--held-out", share]
    planned = Run(make_plan(["at", *given, "--imbalance-profile", "as-is", "--batch-size", "2"]))
    announce(planned)
    assert f"mine/val is not read: {said} of train is held out" in capsys.readouterr().out
    planned.config = dataclasses.replace(planned.config, dataset="tiny-imagenet")
    announce(planned)  # its test images are those of val
    assert "is not read" not in capsys.readouterr().out
    planned.close()


def test_batchnorms_that_cannot_be_folded_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reat", *SMALL, "--model", "preact_resnet18", "--data", data, "--epochs", 1]
    assert run(*arguments, "--limit-batches", 1, "--run-dir", tmp_path / "run") == 0
    assert "9 BatchNorms follow no convolution" in capsys.readouterr().out


def test_no_size_of_a_penalty_is_measured_where_there_is_none_and_parts_are_as_in_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(gauge, "tail_gradient_share", lambda *_, **named: asked.append(named))
    common = ["reat", *SMALL, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    plain = ["--tail", "none"]
    for flags in (plain, ["--objective", "ce", *plain], ["--accumulate", "3"]):
        planned = Run(make_plan([*common, *flags]))
        assert gauge.penalty_share(planned) is None
        planned.close()
    assert [named["batch_size"] for named in asked] == [6]  # of batches of 16 in 3 parts
    assert asked[0]["steps"] == 2 and asked[0]["form"] == "official"


@pytest.mark.parametrize(
    ("epochs", "schedule", "told"),
    [(100, "multistep", False), (110, "multistep", True), (200, "cosine", False)],
)
def test_epochs_are_said_to_have_moved_where_they_have_and_act(
    epochs: int, schedule: str, told: bool, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["at-bsl", *SMALL, "--data", data, "--epochs", epochs, "--schedule", schedule]
    planned = Run(make_plan([str(word) for word in given]))
    announce(planned)
    planned.close()
    said = "110 epochs in place of 100, so in proportion --milestones 82 99\n"
    shown = capsys.readouterr().out
    assert (said in shown) is ("--milestones" in shown) is told


def test_a_run_of_a_preset_that_this_version_lacks_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = ["at", *SMALL, "--data", data, "--epochs", 1, "--beta", 3, "--run-dir", folder]
    assert run(*arguments) == 0
    state = checkpoint.load_checkpoint(folder / checkpoint.CHECKPOINT)
    checkpoint.save_checkpoint(folder, {**state, "preset": "of-yesterday"})
    capsys.readouterr()
    assert run("--resume", folder) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("preset of-yesterday (resumed from ")
    assert "--beta 3: does nothing here" in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            "at --attack fgsm-rs --start none --steps 5",
            "attack: fgsm-rs, one step of 10/255 from even noise of 8/255; --start, --steps and "
            "--step-size do not act",
        ),
        (
            "reat-plus --epochs 150 --awp 0",
            "150 epochs in place of 403, so in proportion --milestones 140 146 --attack-from 140\n",
        ),
        (
            "at --schedule multistep --milestones 1 3 --epochs 2",
            "--milestones 3: never reached in 2 epochs; the learning rate falls fewer times",
        ),
        (
            "at --schedule multistep --milestones 2 3 --epochs 2",
            "--milestones 2 3: never reached in 2 epochs; the learning rate does not fall",
        ),
        (
            "taet --second-stage 2 --epochs 2",
            "--second-stage 2: never reached in 2 epochs, which all train on clean images",
        ),
        (
            "at --awp 0.01 --awp-from 2 --epochs 2",
            "--awp-from 2: never reached in 2 epochs, in which no weights are perturbed",
        ),
        (
            "at --attack-from 2 --epochs 2",
            "--attack-from 2: never reached in 2 epochs, which all train on examples of n-fgsm",
        ),
        (
            "at --attack n-fgsm --attack-from 1",
            "--attack-from 1: does nothing here; it goes with --attack pgd or fgsm-rs",
        ),
        ("at --awp-from 2", "--awp-from 2: does nothing here; it goes with --awp above 0"),
        (
            "at --beta 3",
            "--beta 3: does nothing here; it goes with --objective trades, mart or robal",
        ),
        (
            "at --milestones 1 2 --schedule cosine --epochs 3",
            "--milestones 1 2: does nothing here; it goes with --schedule multistep",
        ),
        (
            "at --evaluation none --held-out 0.1",
            "--evaluation none: nothing looks at the ",
        ),
        ("at --imbalance-profile exp", "--imbalance 0.1: drawn from classes that have 60 to 20 "),
    ],
)
def test_what_will_not_act_is_announced(
    flags: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset, *own = flags.split()
    labels = np.repeat(np.arange(4), [20, 30, 40, 60])
    file = tmp_path / "uneven.npz"
    images = made_images(labels, 3, seed=0)
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    small = [word for word in SMALL if word != "--schedule" and word != "onecycle"]
    for name, lines in (("said", own), ("silent", ["--imbalance-profile", "as-is"])):
        given = [preset, *small, "--data", file, *map(str, lines), "--run-dir", tmp_path / name]
        planned = Run(make_plan([str(word) for word in given]))
        announce(planned)
        planned.close()
        shown = capsys.readouterr().out
        assert (said in shown) is (name == "said")

"""What an evaluation tells its progress bar: passes left at most and done, and the line shown."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import made_npz
from torch import Tensor, nn
from tqdm import tqdm

from reat_fast import checkpoint, evaluate
from reat_fast.cli.command import run_command
from reat_fast.data import ImageSet
from reat_fast.engine.stopping import Interrupted, ended_by_sigterm, exit_code
from reat_fast.evaluate import Attack
from reat_fast.evaluation import autoattack
from reat_fast.evaluation.autoattack import AutoAttack


class RecordingBar:
    """Stands in for tqdm, and keeps what it is told."""

    def __init__(self) -> None:
        self.n, self.total, self.what = 0, 0, ""
        self.announced: list[tuple[str, int]] = []

    def update(self, passes: int) -> None:
        self.n += passes

    def set_description_str(self, what: str, refresh: bool) -> None:
        self.what = what

    def refresh(self) -> None:
        self.announced.append((self.what, self.total - self.n))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()


@pytest.fixture
def right(model: nn.Module) -> ImageSet:
    """Return six images with the labels that the model gives them: with eps 0 none can fall."""
    images = np.random.RandomState(0).randint(0, 256, (6, 2, 2, 3), np.uint8)
    logits = model(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    return ImageSet(images, logits.argmax(1).numpy())


def told(model: nn.Module, image_set: ImageSet, name: str, restarts: int = 1) -> RecordingBar:
    bar = RecordingBar()
    attack = Attack.from_name(name, 0.0, 0.0)
    evaluate.evaluate(
        model, image_set, [attack], 4, eps=0.0, batch_size=4, restarts=restarts, bar=bar
    )
    return bar


@pytest.mark.parametrize("name", ["pgd5", "cw5"])
def test_steps_are_announced_and_counted(model: nn.Module, right: ImageSet, name: str) -> None:
    bar = told(model, right, name)
    # An image costs five steps of two passes and a verdict; three images, then three.
    assert bar.announced == [(name, 6 * 11), (name, 3 * 11)]
    assert bar.n == bar.total == 66


def test_restarts_are_announced_and_counted(model: nn.Module, right: ImageSet) -> None:
    bar = told(model, right, "pgd5", restarts=3)
    assert [passes for _, passes in bar.announced] == [
        *(3 * 66, 3 * 66 - 33),
        *(2 * 66, 2 * 66 - 33),
        *(66, 33),
    ]
    assert bar.n == bar.total == 3 * 66
    right.labels[:2] = (right.labels[:2] + 1) % 4  # wrong from the beginning
    bar = told(model, right, "pgd5", restarts=3)
    # The four that stand are two batches of each later restart: none is larger than of all images.
    assert [passes for _, passes in bar.announced][2:] == [2 * 44, 2 * 44 - 22, 44, 22]
    assert bar.n == bar.total == 66 + 2 * 44


def test_autoattack_announces_what_is_left_if_nothing_more_falls(
    model: nn.Module, right: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"steps": 2, "queries": 3, "state": None}
    monkeypatch.setattr(AutoAttack.__init__, "__kwdefaults__", short)
    bar = told(model, right, "aa")
    # Passes of an image: a verdict on it as it is; for each of four runs of Auto-PGD the logits for
    # the target, three gradients, a look at the best and a verdict; for each of three of FAB-T the
    # target, two gradients, two looks and a verdict; for Square stripes, three queries, a verdict.
    clean, apgd, fab, square = 1, 1 + 3 * 2 + 1 + 1, 1 + 2 * 2 + 2 + 1, 1 + 3 + 1
    later = 4 * apgd + 3 * fab + square
    assert bar.announced[0] == ("aa clean, 6 images stand", 6 * (clean + later))
    assert bar.n == bar.total == 6 * (clean + later) + 1  # one image told the number of classes

    right.labels[[0, 5]] = (right.labels[[0, 5]] + 1) % 4  # wrong from the beginning
    bar = told(model, right, "aa")
    stages = ["apgd-ce", *(f"{name} {rank}" for name in ("apgd-t", "fab-t") for rank in (1, 2, 3))]
    assert bar.announced == [
        ("aa clean, 6 images stand", 6 * (clean + later)),
        ("aa clean, 5 images stand", 3 * clean + 5 * later),
        *(
            (f"aa {stage}, 4 images stand", 4 * passes)
            for stage, passes in zip(
                [*stages, "square"],
                [
                    *(runs * apgd + 3 * fab + square for runs in (4, 3, 2, 1)),
                    *(runs * fab + square for runs in (3, 2, 1)),
                    square,
                ],
                strict=True,
            )
        ),
    ]
    assert bar.n == bar.total == 6 * clean + 4 * later + 1


def test_the_bar_says_what_runs_and_how_long_at_most() -> None:
    shown = tqdm.format_meter(
        n=25, total=100, elapsed=20, prefix="pgd20", bar_format=evaluate.BAR, ascii=True
    )
    assert shown == "pgd20  25% |#####               | 00:20, 01:00 left at most"


def test_a_terminal_gets_the_bar_and_a_pipe_does_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = checkpoint.ModelSpec("resnet8", 4, 3, 8, stem_stride=None, class_names=tuple("0123"))
    checkpoint.save_weights(tmp_path / "made.safetensors", spec.build(), spec)
    data = made_npz(tmp_path / "made.npz", train=10, test=2)
    arguments = [str(tmp_path / "made.safetensors"), "--dataset", "npz", "--data", str(data)]
    arguments += ["--attacks", "pgd2", "--train-counts", "10", "10", "10", "10"]
    assert run_command(evaluate.main, arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run_command(evaluate.main, arguments) == 0
    shown = capsys.readouterr().err.split("\r")
    assert any(line.startswith("pgd2   0% |") and "left at most" in line for line in shown)
    assert not shown[-1].strip()  # gone when it is done
    assert run_command(evaluate.main, [*arguments, "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_evaluation_stopped_within_autoattack_says_how_to_go_on(
    number: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[object] = []

    def stop_at_the_second(search: AutoAttack, stage: str, rank: int, clean: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
        seen.append(stage)
        if len(seen) > 1:
            signal.raise_signal(number)
        return clean

    spec = checkpoint.ModelSpec("resnet8", 4, 3, 8, stem_stride=None, class_names=tuple("abcd"))
    checkpoint.save_weights(tmp_path / "made.safetensors", spec.build(), spec)
    data = made_npz(tmp_path / "made.npz", train=10, test=2)
    arguments = [str(tmp_path / "made.safetensors"), "--dataset", "npz", "--data", str(data)]
    arguments += ["--batch-size", "1", "--attacks", "aa"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a script may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(AutoAttack, "_perturb", stop_at_the_second)
    monkeypatch.setattr(autoattack, "SAVE_EVERY_SECONDS", 0.0)
    assert run_command(evaluate.main, arguments) == 128 + number
    told = "stopped; the same command goes on with AutoAttack where it stands\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_end_what_the_first_made_end(number: int) -> None:
    """As timeout(1) sends it: to the program, and to its group at once."""
    outside = signal.signal(number, signal.SIG_DFL)
    kept = False
    try:
        with pytest.raises(Interrupted) as interrupt, ended_by_sigterm():
            try:
                os.kill(os.getpid(), number)
            finally:
                os.kill(os.getpid(), number)
                kept = True
        assert kept and exit_code(interrupt.value) == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outside)


def test_nohup_keeps_a_closed_terminal_from_ending_a_command() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_by_sigterm():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)

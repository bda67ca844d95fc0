"""The training command: what it leaves behind, resuming, and what it refuses."""

from __future__ import annotations

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import made_images, made_npz
from made_run import run
from torch import Tensor, nn

from reat_fast import checkpoint, train
from reat_fast.data import make_splits
from reat_fast.engine.distributed import World
from reat_fast.engine.graph import CapturedStep
from reat_fast.engine.stopping import Stopped
from reat_fast.evaluate import evaluate
from reat_fast.loaders import Batch
from reat_fast.methods.cosine_head import CosineHead
from reat_fast.models import refuse_other_size
from reat_fast.networks.architectures import Network
from reat_fast.reporting.data import read_run
from reat_fast.reporting.probe import probe_run
from reat_fast.step import TrainStep
from reat_fast.training import gauge, selection
from reat_fast.training import run as training_run
from reat_fast.training.announcement import announce
from reat_fast.training.plan import make_plan
from reat_fast.training.run import Run
from reat_fast.training.save_pace import SavePace

SMALL = ["--dataset", "npz", "--model", "resnet8", "--width", "8", "--imbalance", "0.1"]
SMALL += ["--batch-size", "16", "--steps", "2", "--held-out", "0.1", "--eval-batch-size", "32"]
SMALL += ["--lr", "0.05", "--schedule", "onecycle", "--eval-every", "1", "--device", "cpu"]


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_leaves_everything_behind(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--run-dir", run_dir, "--epochs", 6]
    assert run(*arguments, "--eps", "2/255", "--step-size", "1/255", "--no-augment") == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].startswith("preset reat (as asked); expected time ")
    assert "RBL weights cannot change" in shown
    share = re.search(
        r"^tail penalty \(official\): with the last weights its gradient by the features has "
        r"(\S+) % of the length of balanced softmax's$",
        shown,
        re.MULTILINE,
    )
    assert share is not None and 0 < float(share[1]) < 100
    names = {path.name for path in run_dir.iterdir()}
    assert names == {
        "config.json",
        "env.json",
        "split.json",
        "metrics.csv",
        "timing.csv",
        "checkpoint-last.pt",
        "checkpoint-previous.pt",
        "best.safetensors",
        "last.safetensors",
        "evaluation.json",
        "accuracy.png",
        "learning.png",
    }
    metrics = rows(run_dir)
    assert [int(row["epoch"]) for row in metrics] == [1, 2, 3, 4, 5, 6]
    assert float(metrics[-1]["loss"]) < float(metrics[0]["loss"])
    for row in metrics:
        assert sum(map(int, row["ae_counts"].split())) == sum(
            json.loads((run_dir / "split.json").read_text())["train_counts"]
        )
    state = checkpoint.load_checkpoint(run_dir / "checkpoint-last.pt")
    split = json.loads((run_dir / "split.json").read_text())
    assert split["images_sha256"] == state["images"] and len(state["images"]) == 64
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    clean = evaluation["attacks"]["clean"]
    assert evaluation["samples"] == 24
    assert clean["overall"] > 60 > 25  # four classes: chance is 25
    assert evaluation["attacks"]["pgd20"]["overall"] <= clean["overall"]
    assert f"{clean['overall']:.2f}" in shown
    for picture in ("accuracy.png", "learning.png"):
        assert (run_dir / picture).read_bytes()[:4] == b"\x89PNG"
    assert checkpoint.load_model(run_dir)(torch.rand(1, 3, 8, 8)).shape == (1, 4)


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


RESUMED = ["--fused", "--no-fused", "--ema 0.9", "--awp 0.1 --awp-from 1", "--attack-from 1"]


@pytest.mark.parametrize("flags", RESUMED)
def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(
    data: Path, tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 3, *flags.split(), "--run-dir"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*arguments, whole) == 0
    train_epoch = train.train_epoch

    def stop_in_the_second(this: Run, *others: object) -> None:
        if this.epoch == 1:
            raise KeyboardInterrupt
        train_epoch(this, *others)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(train, "train_epoch", stop_in_the_second)
        assert run(*arguments, cut) == 130
    assert len(rows(cut)) == 1
    assert run("--resume", cut) == 0
    assert (cut / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    for name in ("last.safetensors", "best.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("flags", ["--awp 0.01 --awp-from 2", "--attack-from 2"])
def test_a_step_is_captured_again_in_the_epoch_that_takes_another(
    data: Path, tmp_path: Path, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recorded] = []

    class Recorded(CapturedStep):
        """A recording that launches the step, whose graph a CPU cannot make."""

        def __init__(self, step: TrainStep, batch: Batch, total: int | None = None) -> None:
            self.step, self._kind, self.steps, self.closed = step, step.kind, 0, 0
            made.append(self)

        def train_on(self, batch: Batch, total: int | None = None) -> dict[str, torch.Tensor]:
            assert not self.outdated
            self.steps += 1
            return self.step.train_on(batch, total)

        def close(self) -> None:
            self.closed += 1

    monkeypatch.setattr(training_run, "CapturedStep", Recorded)
    monkeypatch.setattr(Run, "captures", True)
    given = [*flags.split(), "--epochs", 3, "--drop-last"]
    assert run("at", *SMALL, *given, "--data", data, "--run-dir", tmp_path / "run") == 0
    first, second = made
    assert first.steps == 2 * second.steps > 0
    assert first.closed == second.closed == 1


def test_a_finished_run_can_be_resumed_to_its_table(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert run("reat", *SMALL, "--data", data, "--epochs", 1, "--run-dir", run_dir) == 0
    tested = json.loads((run_dir / "evaluation.json").read_text())
    (run_dir / "evaluation.json").unlink()
    assert run("--resume", run_dir) == 0
    found = json.loads((run_dir / "evaluation.json").read_text())
    assert found["attacks"] == tested["attacks"]
    (run_dir / "evaluation.json").write_text(json.dumps({**tested, "samples": 3}))
    assert run("--resume", run_dir) == 0
    assert json.loads((run_dir / "evaluation-2.json").read_text())["samples"] == 3
    assert json.loads((run_dir / "evaluation.json").read_text())["samples"] == tested["samples"]


def test_what_a_resumed_run_refuses(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    assert run("reat", *SMALL, "--data", data, "--epochs", 1, "--run-dir", run_dir) == 0
    other = made_npz(tmp_path / "other.npz", train=41)
    with np.load(data) as arrays:
        inverted = {**arrays, "x_train": 255 - arrays["x_train"]}
    np.savez(tmp_path / "inverted.npz", **inverted)
    capsys.readouterr()
    for arguments, named in [
        (("reat", *SMALL, "--data", data, "--run-dir", data / "x"), "x: cannot be made (Not a dir"),
        (("--resume", run_dir, "--lr", "0.3"), "--lr 0.3: the run was begun with 0.05"),
        (("--resume", run_dir, "--data", other), "the training images are not those"),
        (("--resume", run_dir, "--data", tmp_path / "inverted.npz"), "the training images are not"),
        (("--resume", tmp_path / "absent"), "absent: no such folder"),
        (("--resume", tmp_path), "checkpoint-last.pt: no such checkpoint"),
        (("reat", "--resume", run_dir), "a run keeps its preset"),
        (("--resume", run_dir, "--run-dir", tmp_path), f"the run stays in {run_dir}; leave it out"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("reet",), "unknown preset 'reet'"),
        (("--dataset", "cifar11"), "--dataset cifar11: is unknown; give one of cifar10"),
        (("--model", "resnet9"), "--model resnet9: is unknown; give one of resnet8"),
        (("--imbalance", "0"), "--imbalance 0.0"),
        (("--imbalance", "0.001"), "imbalance"),
        (("--eps", "-8/255"), "--eps"),
        (("--device", "tpu"), "--device tpu"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--data", "absent.npz"), "absent.npz"),
        (("--largest", "100000"), "100000"),
        (("--image-size", "4"), "--image-size: the images of npz have one size already"),
        (("--no-fused", "--attack-loss", "rbl_offsets"), "--no-fused"),
        (("--tail", "unofficial"), "--tail"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    data: Path,
    tmp_path: Path,
    arguments: tuple[str, ...],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    preset = [] if arguments[0] == "reet" else ["reat", *SMALL, "--data", data]
    assert run(*preset, *arguments, "--run-dir", run_dir) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert named in error
    assert not run_dir.exists()


def test_an_existing_run_folder_is_refused_with_the_cure(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("mine")
    assert run(*SMALL, "--data", data, "--run-dir", tmp_path) == 2
    assert f"--resume {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--schedule", "constant", "--data", data, "--lr", "1e30"]
    assert run(*arguments, "--epochs", 2, "--run-dir", run_dir) == 1
    assert "the loss is not finite in epoch 1" in capsys.readouterr().err


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("flags", [[], ["--evaluation", "none"]], ids=["chosen", "tested"])
def test_a_network_whose_logits_are_no_numbers_is_given_no_accuracy(
    flags: list[str],
    saved: bool,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SavePace, "affordable", lambda pace: saved)  # before an evaluation
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--limit-batches", 1, "--epochs", 1, *flags]
    # Loss and weights of the only step are finite; no step comes after it.
    arguments += ["--schedule", "constant", "--lr", "1e6"]
    assert run(*arguments, "--run-dir", run_dir) == 1
    error = capsys.readouterr().err
    assert "some logits are NaN or infinite" in error
    if not flags:
        good = run_dir / ("checkpoint-previous.pt" if saved else "checkpoint-last.pt")
        back = f" in a new run, or go on with --resume {run_dir} --on-nonfinite rollback"
        cure = f"lower --lr{'' if saved else back}; the state before it is in {good}"
        assert f"in epoch 1: {cure}" in error
        assert checkpoint.load_checkpoint(good)["batch"] == 0
    assert not {"best.safetensors", "evaluation.json"} & {file.name for file in run_dir.iterdir()}


def test_official_evaluation_looks_at_the_test_set_every_epoch(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 2, "--evaluation", "official"]
    assert run(*arguments, "--held-out", "0", "--run-dir", run_dir) == 0
    metrics = rows(run_dir)
    best = max(metrics, key=lambda row: (float(row["eval_robust"]), int(row["epoch"])))
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["weights_epoch"] == int(best["epoch"])
    assert evaluation["attacks"]["pgd20"]["overall"] == float(best["eval_robust"])


@pytest.mark.parametrize("flags", [["--evaluation", "none"], ["--select", "last"]])
def test_without_evaluation_or_where_asked_the_last_weights_are_tested(
    flags: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two epochs the first is the best.
    monkeypatch.setattr(selection, "_rank", lambda found: (True, -found["epoch"]))
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 2, "--limit-batches", 1, *flags]
    assert run(*arguments, "--run-dir", run_dir) == 0
    assert (run_dir / "best.safetensors").exists() == ("last" in flags)
    tested = json.loads((run_dir / "evaluation.json").read_text())
    assert (tested["weights"], tested["weights_epoch"]) == ("last.safetensors", 2)


def test_averaged_weights_are_what_is_evaluated_chosen_and_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[dict[str, Tensor]] = []

    def noting_evaluate(network: Network, *others: Any, **settings: Any) -> dict[str, Any]:
        evaluated.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return evaluate(network, *others, **settings)

    monkeypatch.setattr(selection, "evaluate", noting_evaluate)
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--ema", 0.9]
    assert run(*arguments, "--run-dir", run_dir) == 0
    state = checkpoint.load_checkpoint(run_dir / "checkpoint-last.pt")
    averaged = {
        name.removeprefix("average."): tensor
        for name, tensor in state["step"].items()
        if name.startswith("average.")
    }
    assert set(averaged) == {
        n for n, tensor in state["model"].items() if tensor.is_floating_point()
    }
    assert all(not torch.equal(tensor, state["model"][n]) for n, tensor in averaged.items())
    saved = [
        checkpoint.load_model(run_dir / name).state_dict()
        for name in ("last.safetensors", "best.safetensors", "checkpoint-last.pt")
    ]
    assert len(evaluated) == 2  # to choose the epoch, and the test
    for weights in (*saved, *evaluated):
        assert all(torch.equal(weights[name], tensor) for name, tensor in averaged.items())


@pytest.mark.parametrize(
    ("flags", "found", "chosen"),
    [
        # Epochs 4 to 6 have a tenth of the learning rate: a lucky one before them does not count.
        (["--schedule", "multistep", "--milestones", 3], [10, 60, 20, 30, 50, 40], 5),
        (["--schedule", "multistep", "--milestones", 3], [10, 60, 20, 30, 30, 20], 5),
        # A learning rate that rises is not one that has fallen.
        (["--schedule", "onecycle", "--warmup", 0.5], [60, 10, 20, 30, 50, 40], 6),
        (["--schedule", "constant"], [10, 60, 20, 30, 50, 40], 2),
        (["--schedule", "multistep", "--milestones", 9], [10, 60, 20, 30, 50, 40], 2),
        (
            ["--schedule", "multistep", "--milestones", 3, "--evaluation", "official"],
            [10, 60, 20, 30, 50, 40],
            2,
        ),
    ],
)
def test_an_epoch_is_chosen_once_the_learning_rate_has_fallen(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[Any],
    found: list[float],
    chosen: int,
) -> None:
    left = list(found)

    def scripted(network: Network, image_set: Any, attacks: Any, *others: Any, **more: Any) -> Any:
        result = evaluate(network, image_set, attacks, *others, **more)
        for name, figures in result["attacks"].items():
            if name != "clean" and left:
                figures["balanced"] = figures["overall"] = left.pop(0)
        return result

    monkeypatch.setattr(selection, "evaluate", scripted)
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 6, "--limit-batches", 1, *flags]
    assert run(*arguments, "--run-dir", run_dir) == 0
    assert [float(row["eval_robust"]) for row in rows(run_dir)] == found
    assert json.loads((run_dir / "evaluation.json").read_text())["weights_epoch"] == chosen


def test_a_run_is_made_of_what_its_flags_say(data: Path, tmp_path: Path) -> None:
    flags = "--seed 5 --split-seed 7 --held-out 0.2 --sampler progressive --epochs 3 --drop-last"
    head = "--head cosine --head-scale 7 --post-tau 0.5 --objective ce --tail none"
    arguments = ["reat", *SMALL, *flags.split(), *head.split(), "--data", str(data)]
    planned = Run(make_plan([*arguments, "--run-dir", str(tmp_path / "run")]))
    order, splits = planned.order, planned.splits
    assert (order.sampler, order.seed, order.epochs, order.drop_last) == ("progressive", 5, 3, True)
    expected = make_splits(planned.dataset, imbalance=0.1, held_out=0.2, seed=7)
    assert splits.fingerprint == expected.fingerprint
    count = len(splits.train)
    assert len(order) == planned.batches == count // 16 > 1
    assert [planned.images_in(batch) for batch in (0, count // 16)] == [16, count % 16]
    torch.manual_seed(5)
    drawn = next(planned.spec.build().parameters())
    assert torch.equal(next(planned.model.parameters()), drawn)
    prior = torch.tensor(splits.counts).double() / count
    classifier = planned.model.fc
    assert isinstance(classifier, CosineHead) and float(classifier.scale) == 7
    torch.testing.assert_close(classifier.compensation, (0.5 * prior.log()).float())
    planned.close()


def test_limit_batches_shortens_epochs_and_evaluations(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--limit-batches", 1]
    assert run(*arguments, "--run-dir", run_dir) == 0
    assert sum(map(int, rows(run_dir)[0]["ae_counts"].split())) == 16
    assert json.loads((run_dir / "evaluation.json").read_text())["samples"] == 16


def test_grey_images_of_any_size(tmp_path: Path) -> None:
    data = made_npz(tmp_path / "grey.npz", channels=1)
    assert made_images(torch.tensor([0]).numpy(), 1, 0).shape == (1, 8, 8, 1)
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--run-dir", tmp_path / "run"]
    assert run(*arguments) == 0


def test_the_command_runs_as_a_module_without_a_traceback(tmp_path: Path) -> None:
    for arguments, code in [(["--help"], 0), (["nothing"], 2)]:
        command = [sys.executable, "-m", "reat_fast.train", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert "Traceback" not in done.stderr


def test_a_deterministic_run_gives_the_same_bits_again(data: Path, tmp_path: Path) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 2, "--deterministic", "--run-dir"]
    folders = [tmp_path / "one", tmp_path / "two"]
    try:
        for folder in folders:
            assert run(*arguments, folder) == 0
            assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("metrics.csv", "last.safetensors", "best.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_a_quiet_run_prints_the_table_alone(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--quiet"]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert shown.out.lstrip().startswith("accuracy in %") and "epoch 1/1" not in shown.out
    assert shown.err == ""


def test_profile_says_how_long_the_step_waited_for_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--profile"]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    line = next(row for row in capsys.readouterr().out.splitlines() if "waited for data" in row)
    share = float(line.split("waited for data ")[1].split(" %")[0])
    assert 0 <= share < 100


def test_a_last_batch_that_batchnorm_cannot_take_is_explained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--batch-size", 61]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 2  # 62 images, 1x1 in the last layer
    error = capsys.readouterr().err
    assert "--batch-size 61: a batch of 1 image leaves BatchNorm one value" in error
    assert error.count("\n") == 1


def test_a_short_last_batch_is_left_out_where_asked(data: Path, tmp_path: Path) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--drop-last"]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    seen = sum(map(int, rows(tmp_path / "run")[0]["ae_counts"].split()))
    assert seen == 48  # 62 images in batches of 16


def test_batchnorms_that_cannot_be_folded_are_named(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["reat", *SMALL, "--model", "preact_resnet18", "--data", data, "--epochs", 1]
    assert run(*arguments, "--limit-batches", 1, "--run-dir", tmp_path / "run") == 0
    assert "9 BatchNorms follow no convolution" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        # 144 images with 2 x 2 + 3 passes for 3 epochs, the test's 24 with 1 and 41, 3 evaluations
        # of the 16 held out with 1 and 21.
        ([], 3 * 144 * 7 + 24 * 42 + 3 * 16 * 22),
        (["--eval-every", "2", "--select", "last"], 3 * 144 * 7 + 24 * 42 + 2 * 16 * 22),
        (["--attack", "fgsm-rs"], 3 * 144 * 5 + 24 * 42 + 3 * 16 * 22),
        (["--attack", "free", "--replays", "4"], 3 * 144 * 12 + 24 * 42 + 3 * 16 * 22),
        (["--evaluation", "none", "--limit-batches", "1"], 3 * 16 * 7 + 16 * 42),
    ],
)
def test_the_expected_time_counts_the_passes_that_are_left(
    flags: list[str], passes: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "seconds_per_step", lambda run: 2.0)
    small = [*SMALL, "--imbalance", "1", "--epochs", "3", *flags]
    arguments = ["reat", *small, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    planned = Run(make_plan(arguments))
    assert selection.expected_seconds(planned) == pytest.approx(passes)
    planned.close()


def test_a_saved_run_goes_on_with_all_of_its_position(data: Path, tmp_path: Path) -> None:
    arguments = ["reat", *SMALL, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    first, second = Run(make_plan(arguments)), Run(make_plan(arguments))
    position = {"epoch": 2, "batch": 3, "lr_scale": 0.25, "best": {"epoch": 1, "robust": 30.0}}
    for name, value in position.items():
        setattr(first, name, value)
    first.folder.mkdir()
    first.save()
    second.load_state(checkpoint.load_checkpoint(first.folder / checkpoint.CHECKPOINT))
    assert {name: getattr(second, name) for name in position} == position
    first.close()
    second.close()


def test_the_time_since_the_last_save_is_that_of_all_processes(data: Path, tmp_path: Path) -> None:
    # Else those that write nothing would find it late and wait for their device at every step.
    arguments = ["reat", *SMALL, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    planned = Run(make_plan(arguments))
    planned.world = World(1, 2)
    before = planned.save_pace.age
    planned.save()
    assert planned.save_pace.age < before and not (tmp_path / "run").exists()
    planned.close()


def test_processes_share_the_training_and_the_evaluations(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "seconds_per_step", lambda run: 2.0)
    arguments = ["reat", *SMALL, "--imbalance", "1", "--epochs", "3", "--data", str(data)]
    planned = Run(make_plan([*arguments, "--run-dir", str(tmp_path / "run")]))
    alone = selection.expected_seconds(planned)
    planned.world = World(0, 4)
    assert selection.expected_seconds(planned) == pytest.approx(alone / 4)
    planned.close()


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ("--eval-every 3 --epochs 8 --select last", [2, 5, 7]),
        # Where the best epoch is looked for a fifth, once the learning rate has fallen: at 5 here.
        ("--eval-every 3 --epochs 8", [2, 5, 6, 7]),
        ("--eval-every 3 --epochs 8 --schedule constant", [2, 5, 7]),
        ("--eval-every 10 --epochs 9 --schedule multistep --milestones 3", [3, 5, 7, 8]),
        ("--eval-every 3 --epochs 8 --evaluation official", [2, 5, 7]),
        ("--epochs 8 --evaluation official", list(range(8))),
        ("--epochs 8 --select last", [4, 7]),
        ("--eval-every 3 --epochs 8 --evaluation none", []),
        ("--eval-every 3 --epochs 8 --held-out 0", []),
        ("--eval-every 9 --epochs 2", [1]),
    ],
)
def test_every_few_epochs_and_at_the_end_weights_are_evaluated(
    flags: str, due: list[int], data: Path, tmp_path: Path
) -> None:
    own = SMALL.index("--eval-every")
    small = [*SMALL[:own], *SMALL[own + 2 :]]
    arguments = ["reat", *small, *flags.split(), "--data", str(data)]
    planned = Run(make_plan([*arguments, "--run-dir", str(tmp_path / "run")]))
    epochs = range(planned.config.epochs)
    assert [epoch for epoch in epochs if selection.evaluation_is_due(planned, epoch)] == due
    planned.close()


@pytest.mark.parametrize(
    ("flags", "settled"),
    [
        ("--schedule multistep --milestones 2 4 --epochs 6", [2, 3, 4, 5]),
        ("--schedule multistep --milestones 2 4 --gamma 0.9 --epochs 6", []),
        ("--schedule constant --epochs 6", []),
        ("--schedule cosine --epochs 6", [3, 4, 5]),
        ("--schedule onecycle --warmup 0.25 --epochs 8", [5, 6, 7]),
        ("--schedule onecycle --warmup 0.75 --epochs 9", [8]),
        ("--schedule onecycle --warmup 0.25 --epochs 2", [1]),
        ("--schedule onecycle --evaluation official --epochs 4", []),
    ],
)
def test_epochs_count_once_the_learning_rate_fell_to_half_its_peak(
    flags: str, settled: list[int], data: Path, tmp_path: Path
) -> None:
    arguments = ["reat", *SMALL, *flags.split(), "--data", str(data)]
    planned = Run(make_plan([*arguments, "--run-dir", str(tmp_path / "run")]))
    epochs = range(planned.config.epochs)
    assert [epoch for epoch in epochs if selection.is_settled(planned, epoch)] == settled
    planned.lr_scale = 0.5  # after a rollback
    later = [epoch for epoch in epochs if selection.is_settled(planned, epoch)]
    assert set(settled) <= set(later)
    if "constant" in flags:
        assert later == list(epochs)
    planned.close()


@pytest.mark.parametrize("model", ["resnet8", "preact_resnet18"])
def test_a_network_thinner_than_a_register_trains_on_a_cpu(
    model: str, data: Path, tmp_path: Path
) -> None:
    arguments = ["reat", *SMALL, "--model", model, "--width", 3, "--limit-batches", 2]
    assert run(*arguments, "--epochs", 1, "--data", data, "--run-dir", tmp_path / "run") == 0


def test_the_way_to_go_on_can_be_pasted_and_the_time_of_the_test_is_announced(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my run's"
    begin = ["reat", *SMALL, "--data", data, "--epochs", 1, "--run-dir", folder]
    with monkeypatch.context() as patched:
        patched.setattr(train, "test", lambda *_: (_ for _ in ()).throw(Stopped(130)))
        assert run(*begin) == 130
    told = capsys.readouterr().err.strip()
    assert told.startswith("stopped; go on with: python -m reat_fast.train ")
    assert run(*shlex.split(told.partition("reat_fast.train ")[2])) == 0
    assert re.search(r"^testing on 24 images, about \d+ s$", capsys.readouterr().out, re.MULTILINE)


def test_a_set_whose_classes_are_not_by_size_has_its_small_ones_for_the_tail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.repeat(np.arange(6), [4, 8, 12, 20, 30, 46])
    tested = np.arange(24) % 6
    images = {"x_train": made_images(labels, 3, 1), "x_test": made_images(tested, 3, 2)}
    np.savez(tmp_path / "own.npz", y_train=labels, y_test=tested, **images)
    small = [*SMALL, "--imbalance-profile", "as-is", "--epochs", 2]
    folder = tmp_path / "run"
    assert run("reat", *small, "--data", tmp_path / "own.npz", "--run-dir", folder) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    parts = {words[0]: words[1] for words in shown if len(words) == 5 and words[0].isdigit()}
    assert parts == {"5": "head", "4": "head", "3": "body", "2": "body", "1": "body", "0": "tail"}
    tested_as = json.loads((folder / "evaluation.json").read_text())["attacks"]["clean"]
    assert tested_as["tail"] == tested_as["per_class"][0]
    record = read_run(folder)
    assert record.order == [5, 4, 3, 2, 1, 0] and record.counts == [41, 27, 18, 11, 7, 3]
    assert record.class_names == ["5", "4", "3", "2", "1", "0"]
    found = probe_run(record, 12, None, torch.device("cpu"))
    assert found.labels.tolist() == [5 - c for c in tested[::2]]
    told = [int(n) for n in rows(folder)[-1]["ae_counts"].split()]
    assert record.ae_counts[-1] == told[::-1]


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
    ("flags", "said"),
    [
        (
            "at --attack fgsm-rs --start none --steps 5",
            "attack: fgsm-rs, one step of 10/255 from even noise of 8/255; --start, --steps and "
            "--step-size do not act",
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


def test_a_run_finds_its_data_from_every_folder(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data.parent)
    run_dir = tmp_path / "run"
    arguments = ["at", *SMALL, "--data", data.name, "--run-dir", run_dir, "--epochs", 1, "--quiet"]
    assert run(*arguments) == 0
    monkeypatch.chdir(tmp_path)
    assert json.loads((run_dir / "config.json").read_text())["data"] == str(data)
    assert run("--resume", run_dir, "--quiet") == 0


@pytest.mark.parametrize("left", ["wandb-id.txt", "wandb", "events.out.tfevents.1.host", "notes"])
def test_what_a_log_left_of_a_run_that_never_began_is_no_run(
    left: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    (folder / left).mkdir(parents=True)
    code = run("at", *SMALL, "--data", data, "--run-dir", folder, "--epochs", 1, "--quiet")
    assert code == (2 if left == "notes" else 0)


class Picky(nn.Module):
    """Take images of one size, as a vision transformer does."""

    def forward(self, images: Tensor) -> Tensor:
        assert images.shape[2:] == (224, 224), "Input height (8) doesn't match model (224).\nmore"
        return images.mean((2, 3))


def test_a_network_that_takes_another_size_is_refused_in_one_line() -> None:
    network = Picky()
    with pytest.raises(
        ValueError, match=r"^--model timm/vit: takes no images of 8 x 9 pixels"
    ) as e:
        refuse_other_size(network, "timm/vit", (8, 9, 3))
    assert "doesn't match model (224).); name another" in str(e.value)
    refuse_other_size(network, "timm/vit", (224, 224, 3))
    assert network.training

"""The training command: what it leaves behind, resuming, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
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
from made_run import SMALL, rows, run
from torch import Tensor, nn

from reat_fast import checkpoint, evaluate, train
from reat_fast.data import make_splits
from reat_fast.engine import replayed_step
from reat_fast.engine.captured_step import CapturedStep
from reat_fast.engine.distributed import World
from reat_fast.engine.replayed_step import ReplayedStep
from reat_fast.engine.stopping import Stopped
from reat_fast.loaders import Batch
from reat_fast.methods.cosine_head import CosineHead
from reat_fast.models import refuse_other_size
from reat_fast.step import TrainStep
from reat_fast.training.faults import refuse_single_images
from reat_fast.training.plan import make_plan
from reat_fast.training.run import Run


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

    monkeypatch.setattr(replayed_step, "CapturedStep", Recorded)
    monkeypatch.setattr(ReplayedStep, "captures", True)
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
        (("--resume", run_dir / "checkpoint-last.pt"), f"is a file; give its folder, {run_dir}"),
        (("--resume", tmp_path), "checkpoint-last.pt: no such checkpoint"),
        (("reat", "--resume", run_dir), "a run keeps its preset"),
        (("--resume", run_dir, "--run-dir", tmp_path), f"the run stays in {run_dir}; leave it out"),
    ]:
        assert run(*arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.count("\n") == 1
    described = (run_dir / "config.json").read_text()
    for edited, refused in (
        (described.replace('"lr": 0.05', '"lr": 0.3'), "config.json: says --lr 0.3, the run was"),
        (described.replace('"quiet": false', '"quiet": true'), ""),  # computes the same
        ("damaged", ""),
    ):
        assert edited != described
        (run_dir / "config.json").write_text(edited)
        assert run("--resume", run_dir) == (2 if refused else 0)
        assert refused in capsys.readouterr().err
        assert refused or '"quiet": false' in (run_dir / "config.json").read_text()


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
    # Quiet was the command, not the run.
    assert not make_plan(["--resume", str(tmp_path / "run")]).config.quiet


def test_tf32_that_a_cpu_has_not_is_said_and_not_recorded(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--precision", "tf32"]
    assert run(*arguments, "--run-dir", run_dir) == 0
    assert "--precision tf32: a CPU has none, so" in capsys.readouterr().out
    assert json.loads((run_dir / "evaluation.json").read_text())["precision"] == "float32"
    assert evaluate.main([str(run_dir), "--attacks", "clean", "--precision", "tf32"]) == 0
    assert "--precision tf32: a CPU has none, so attacks" in capsys.readouterr().err


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
    assert "add --drop-last" in error and error.count("\n") == 1
    more = ["--batch-size", 60, "--accumulate", 2, "--run-dir", tmp_path / "parts"]
    assert run(*arguments, *more) == 2
    assert "--batch-size 60 --accumulate 2: a batch of 1 image" in capsys.readouterr().err
    for small in (["--batch-size", 1], ["--batch-size", 2, "--accumulate", 2]):
        assert run(*arguments, *small, "--drop-last", "--run-dir", tmp_path / "one") == 2
        assert "per channel; give more images a step" in capsys.readouterr().err
    assert not [*tmp_path.glob("*/config.json")]  # found before the run begins, not at its end


def test_a_trial_of_one_image_leaves_devices_of_others_alone(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--batch-size", 61, "--run-dir", tmp_path / "run"]
    planned = Run(make_plan([str(argument) for argument in arguments]))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("set up"))
    planned.model.eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        refuse_single_images(planned)
    planned.world = dataclasses.replace(planned.world, size=2)
    refuse_single_images(planned)  # together they may have more
    planned.close()


def test_a_trial_of_one_image_leaves_statistics_and_random_numbers_alone(
    data: Path, tmp_path: Path
) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--batch-size", 61, "--run-dir", tmp_path / "run"]
    planned = Run(make_plan([str(argument) for argument in arguments]))
    channels = planned.splits.train.images.shape[3]
    layers = nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.Dropout()
    model: Any = nn.Sequential(*layers).eval()
    planned.model, kept, numbers = model, copy.deepcopy(model.state_dict()), torch.get_rng_state()
    refuse_single_images(planned)
    planned.close()
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), numbers) and not model.training


def test_a_short_last_batch_is_left_out_where_asked(data: Path, tmp_path: Path) -> None:
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--drop-last"]
    assert run(*arguments, "--run-dir", tmp_path / "run") == 0
    seen = sum(map(int, rows(tmp_path / "run")[0]["ae_counts"].split()))
    assert seen == 48  # 62 images in batches of 16


def test_a_saved_run_goes_on_with_all_of_its_position(data: Path, tmp_path: Path) -> None:
    arguments = ["reat", *SMALL, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    first, second = Run(make_plan(arguments)), Run(make_plan(arguments))
    position = {"epoch": 2, "batch": 3, "lr_scale": 0.25, "best": {"epoch": 1, "robust": 30.0}}
    for name, value in position.items():
        setattr(first, name, value)
    first.folder.mkdir()
    first.save()
    file = first.folder / checkpoint.CHECKPOINT
    second.load_state(checkpoint.load_checkpoint(file), file)
    assert {name: getattr(second, name) for name in position} == position
    first.close()
    second.close()


def test_the_work_that_is_left_is_that_of_the_steps_to_come(data: Path, tmp_path: Path) -> None:
    arguments = ["at-bsl", *SMALL, "--data", str(data), "--steps", "10", "--epochs", "3"]
    arguments += ["--attack-from", "2", "--run-dir", str(tmp_path / "run")]
    planned = Run(make_plan(arguments))
    steps, (cheap, dear) = planned.batches, (5, 23)  # forward passes an image: n-fgsm, ten steps
    assert planned.work_left == steps * (2 * cheap + dear)
    planned.epoch, planned.batch = 1, 2
    assert planned.work_left == (steps - 2) * cheap + steps * dear
    planned.epoch = 2
    assert planned.work_left == (steps - 2) * dear
    planned.epoch, planned.batch = 3, 0
    assert planned.work_left == 0
    planned.close()


def test_the_time_since_the_last_save_is_that_of_all_processes(data: Path, tmp_path: Path) -> None:
    # Else those that write nothing would find it late and wait for their device at every step.
    arguments = ["reat", *SMALL, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    planned = Run(make_plan(arguments))
    planned.world = World(1, 2)
    before = planned.save_pace.age
    planned.save()
    assert planned.save_pace.age < before and not (tmp_path / "run").exists()
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

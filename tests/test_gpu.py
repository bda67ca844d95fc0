"""What only a CUDA device can show: no waiting, eager equals captured, a short training.

make gpu
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_data import made_npz
from test_step import COUNTS, make_model, uint8_batch

from reat_fast import train, verify
from reat_fast.command import run_command
from reat_fast.config import PRESETS, Config
from reat_fast.graph import CapturedStep
from reat_fast.loaders import Batch
from reat_fast.step import TrainStep, make_optimizer
from reat_fast.train import set_learning_rate

pytestmark = pytest.mark.gpu


@pytest.fixture
def reproducible() -> Iterator[None]:
    """Fix the algorithms, so that eager and captured steps can be compared bit for bit."""
    flags = torch.backends.cudnn
    before = (flags.deterministic, flags.benchmark, flags.allow_tf32)
    flags.deterministic, flags.benchmark, flags.allow_tf32 = True, False, False
    yield
    flags.deterministic, flags.benchmark, flags.allow_tf32 = before


def on_gpu(batch: Batch) -> Batch:
    tensors = {name: getattr(batch, name).cuda() for name in ("images", "labels", "indices")}
    return dataclasses.replace(batch, **tensors)


def make_step(config: Config) -> TrainStep:
    model = make_model(head=config.head).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return TrainStep(model, make_optimizer(model, config), COUNTS, config)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_never_waits_for_the_device(preset: str, precision: str) -> None:
    config = dataclasses.replace(PRESETS[preset], precision=precision)  # type: ignore[arg-type]
    step, batch = make_step(config), on_gpu(uint8_batch())
    step.train_on(batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.train_on(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("gather", [True, False])
def test_replays_equal_eager_steps(precision: str, gather: bool, reproducible: None) -> None:
    config = Config(precision=precision, lr=0.05)  # type: ignore[arg-type]
    eager, captured = make_step(config), make_step(config)
    batch = on_gpu(uint8_batch(gather))
    replayed = CapturedStep(captured, batch)
    for k in range(4):
        for step in (eager, captured):
            set_learning_rate(step.optimizer, 0.05 / (1 + k))
        expected = eager.train_on(batch)
        found = replayed.train_on(batch)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (k, name)
        if k == 0:  # the first eager step makes workspaces that stay
            before = torch.cuda.memory_allocated()
        if k == 1:
            assert eager.end_epoch() == captured.end_epoch()
    for a, b in zip(eager.state_tensors(), captured.state_tensors(), strict=True):
        assert torch.equal(a, b)
    del expected, found
    assert torch.cuda.memory_allocated() <= before + 2**20  # replays allocate nothing
    replayed.close()


CHEAP = {"fgsm-rs": {"attack": "fgsm-rs"}, "free": {"attack": "free", "replays": 2}}
CAPTURED = {**PRESETS, **{n: dataclasses.replace(Config(), **c) for n, c in CHEAP.items()}}  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", CAPTURED)
def test_every_preset_replays_as_it_runs(preset: str, reproducible: None) -> None:
    config = dataclasses.replace(CAPTURED[preset], steps=2, batch_size=8)
    eager, captured = make_step(config), make_step(config)
    batch = on_gpu(uint8_batch())
    replayed = CapturedStep(captured, batch)
    for _ in range(3):
        expected, found = eager.train_on(batch), replayed.train_on(batch)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    for a, b in zip(eager.state_tensors(), captured.state_tensors(), strict=True):
        assert torch.equal(a, b)
    replayed.close()


def test_noise_differs_between_epochs_of_a_replayed_step() -> None:
    step, batch = make_step(Config(steps=0, lr=0.0)), on_gpu(uint8_batch())
    replayed = CapturedStep(step, batch)
    first = replayed.train_on(batch)["images_adv"].clone()
    again = replayed.train_on(batch)["images_adv"].clone()
    step.end_epoch()
    later = replayed.train_on(batch)["images_adv"].clone()
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_every_row_of_verify_holds() -> None:
    assert run_command(verify.main, ["--device", "cuda"]) == 0


@pytest.mark.parametrize("graph", ["auto", "off"])
def test_a_short_training_learns(
    graph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run_dir = made_npz(tmp_path / "made.npz"), tmp_path / "run"
    arguments = ["reat", "--fused", "--dataset", "npz", "--data", data, "--run-dir", run_dir]
    arguments += ["--model", "resnet18", "--width", 16, "--epochs", 6, "--imbalance", 0.1]
    arguments += ["--batch-size", 12, "--eps", "2/255", "--step-size", "1/255", "--no-augment"]
    arguments += ["--lr", 0.05, "--graph", graph, "--device", "cuda"]
    assert run_command(train.main, [str(argument) for argument in arguments]) == 0
    assert ("one CUDA graph" in capsys.readouterr().out) == (graph == "auto")
    with (run_dir / "metrics.csv").open(newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]

"""The tools of bench: what they do without a GPU, and that what needs one is said in one line."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from no_sync import NoSync
from torch import Tensor

from bench import bench_epoch, bench_step, clocks, gpu, host_time
from bench.baselines import PlainStep
from bench.ladder import COUNTS, Ladder, Rung, long_tailed_labels
from bench.official import Official, load_official
from reat_fast.cli.command import run_command
from reat_fast.config import Config
from reat_fast.models import create_model

CPU = torch.device("cpu")


@pytest.fixture
def ladder() -> Ladder:
    return Ladder(CPU, model="resnet8", batch_size=4, size=8, steps=1)


def plain_step(ladder: Ladder, compiled: Any = None) -> tuple[PlainStep, torch.nn.Module]:
    torch.manual_seed(0)
    model = create_model("resnet8", len(COUNTS), width=8)
    return PlainStep(model, ladder.batch, COUNTS, Config(steps=2), compiled), model


def test_plain_pytorch_takes_a_step_on_every_weight_and_never_waits(ladder: Ladder) -> None:
    step, model = plain_step(ladder)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with NoSync():
        loss = step()
    assert loss.isfinite()
    for name, tensor in model.named_parameters():
        assert not torch.equal(tensor, before[name]), name
        assert tensor.grad is None and tensor.requires_grad
    moved = "stem.bn.running_var"
    assert model.training and not torch.equal(model.state_dict()[moved], before[moved])


def test_plain_pytorch_attacks_within_the_ball_and_augments_within_the_image(
    ladder: Ladder,
) -> None:
    step, _ = plain_step(ladder)
    images = step._augmented()
    pixels = ladder.batch.images.permute(0, 3, 1, 2).float() / 255
    known = set(pixels.flatten().tolist()) | {0.0}
    assert images.shape == pixels.shape and set(images.flatten().tolist()) <= known
    adv = step._attacked(images)
    moved = (adv - images).abs()
    # The bound of the ball and the image are rounded once each, by 2^-25 and 2^-24.
    assert 0 < float(moved.max()) <= 8 / 255 + 1.2e-7
    assert float(adv.min()) >= 0 and float(adv.max()) <= 1


def test_a_compiled_baseline_computes_no_weight_gradient_in_the_attack(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def compile_(model: torch.nn.Module, **_: object) -> Any:
        def call(images: Tensor) -> Tensor:
            asked.append(next(model.parameters()).requires_grad)
            logits: Tensor = model(images)
            return logits

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    step, model = plain_step(ladder, "max-autotune")
    step()
    assert asked == [False, False, True]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rungs_are_made_only_when_asked_for(ladder: Ladder) -> None:
    names = [rung.name for rung in ladder.rungs()]
    assert names[0] == "loop reference" and "folded, deterministic" in names
    assert not any("captured" in name or "official" in name for name in names)
    for rung in ladder.rungs():
        if "compiled" not in rung.name:
            rung.make()()


def test_long_tailed_labels_have_the_shares_of_the_training_set() -> None:
    found = long_tailed_labels(sum(COUNTS)).bincount(minlength=len(COUNTS)).tolist()
    assert found == COUNTS
    assert long_tailed_labels(128).bincount(minlength=10)[7:].sum() in (4, 5)  # 3.5 %


def test_deterministic_rungs_leave_the_settings_as_they_were(ladder: Ladder) -> None:
    (rung,) = [rung for rung in ladder.rungs() if rung.name == "folded, deterministic"]
    rung.make()()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("tool", "arguments", "said"),
    [
        (bench_step, ["--rungs", "captured, cudnn"], "--rungs 'captured, cudnn': cannot be timed"),
        (bench_step, ["--repeats", "0"], "--repeats 0: must be at least 1"),
        (bench_step, ["--official", "nowhere"], "--official nowhere: has no loss_functions.py"),
        (bench_epoch, ["--official", "nowhere"], "--official nowhere: has no loss_functions.py"),
        (bench_epoch, ["--largest", "0"], "--largest 0: must be at least 50"),
        (gpu, ["--out", "nowhere"], "no CUDA device was found"),
    ],
)
def test_what_cannot_be_is_one_line(
    tool: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available() and tool is gpu:
        pytest.skip("a CUDA device was found")
    assert run_command(tool.main, [*arguments, *(["--device", "cpu"] * (tool is not gpu))]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_the_ladder_runs_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "resnet8", "--batch-size", "4", "--size", "8", "--steps", "1"]
    rungs = ["--rungs", "channels_last", "folded", "folded, deterministic"]
    arguments = [*small, "--repeats", "2", "--labels", "long-tailed", "--device", "cpu", *rungs]
    benchmark = torch.backends.cudnn.benchmark
    try:
        assert run_command(bench_step.main, arguments) == 0
        shown = capsys.readouterr().out
        assert all(name in shown for name in rungs[1:]) and "long-tailed labels" in shown
        assert run_command(bench_step.main, [*arguments, "--seconds", "0"]) == 0
        assert "folded: left out, 0.0 s have passed" in capsys.readouterr().out
    finally:
        torch.backends.cudnn.benchmark = benchmark


def test_a_rung_that_fails_is_named_and_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> Any:
        raise RuntimeError("cannot be captured\nfor a reason")

    rungs = [Rung("bad", fail), Rung("good", lambda: lambda: None)]
    monkeypatch.setattr(Ladder, "rungs", lambda self: iter(rungs))
    small = ["--model", "resnet8", "--batch-size", "4", "--size", "8", "--device", "cpu"]
    benchmark = torch.backends.cudnn.benchmark
    try:
        assert run_command(bench_step.main, small) == 1
        shown = capsys.readouterr().out
        assert "bad: failed: cannot be captured" in shown and "good  " in shown
        assert run_command(bench_step.main, [*small, "--rungs", "bad"]) == 2
        assert run_command(bench_step.main, [*small, "--model", "no"]) == 2
    finally:
        torch.backends.cudnn.benchmark = benchmark


def test_an_epoch_is_timed_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "resnet8", "--largest", "50", "--test-images", "5", "--batch-size", "32"]
    benchmark = torch.backends.cudnn.benchmark
    try:
        arguments = [*small, "--steps", "1", "--repeats", "1", "--device", "cpu"]
        assert run_command(bench_epoch.main, arguments) == 0
    finally:
        torch.backends.cudnn.benchmark = benchmark
    assert "epoch: ours, evaluation in float32" in capsys.readouterr().out


def made_clone(folder: Path) -> Path:
    """Write what stands for a clone of the official code."""
    lines = {
        "loss_functions": "def REAT(model, x, y, optimizer, counts, at_counts, args):\n"
        "    logits = model(x)\n"
        "    return logits, logits.square().sum() * args.eps + args.ns * args.ss\n",
        "resnet": "import torch\ndef resnet18(dataset):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))\n",
        "wrn": "WideResNet = None\n",
    }
    for name, text in lines.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_folder_that_is_no_clone_is_named(tmp_path: Path) -> None:
    made_clone(tmp_path)
    assert set(load_official(tmp_path)) == {"loss_functions", "resnet", "wrn"}
    with pytest.raises(ValueError, match="runs on a CUDA device only"):
        Official(tmp_path, "resnet18", COUNTS, Config(), CPU)
    (tmp_path / "wrn.py").write_text("wide = 1\n")
    with pytest.raises(ValueError, match=r"wrn.py has no WideResNet; is it REAT's\?"):
        load_official(tmp_path)
    (tmp_path / "wrn.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match=r"wrn.py cannot be run \(No module named"):
        load_official(tmp_path)


def test_the_official_step_does_what_its_script_does(tmp_path: Path) -> None:
    device: Any = SimpleNamespace(type="cuda")  # passes for one until a tensor goes there
    made = made_clone(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda self, *_: self)
        patch.setattr(Tensor, "to", lambda self, *_: self)
        official = Official(made, "resnet18", COUNTS, Config(), device)
        with pytest.raises(ValueError, match="has resnet18 and wrn28_10, not resnet8"):
            Official(made, "resnet8", COUNTS, Config(), device)
        images, labels = torch.rand(6, 3, 8, 8), torch.arange(6)
        deterministic = torch.backends.cudnn.deterministic
        before = [parameter.detach().clone() for parameter in official._model.parameters()]
        official.step(images, labels)
        assert sum(official._predicted) == 6 and sum(official._wrong) <= 6
        after = official._model.parameters()
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert 0 <= official.evaluate(images, labels) <= 6
        assert torch.backends.cudnn.deterministic == deterministic


def test_waits_of_the_host_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert host_time.host_waits(step) == 3
    assert modes == ["warn", "default"]
    assert host_time.host_seconds(lambda: time.sleep(0.002), repeats=2)[0] >= 0.002


@pytest.fixture
def fake_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an nvidia-smi on the path whose clock is 1980 MHz and whose memory clock is hidden."""
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '1980, 1980, [N/A], 512.25, 700.00, 61'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_clocks_are_read_while_something_runs(fake_smi: None) -> None:
    with clocks.watched_clocks() as readings:
        deadline = time.monotonic() + 20
        while not readings and time.monotonic() < deadline:
            time.sleep(0.01)
    found = clocks.summary(readings)
    assert found["sm_mhz"] == {"least": 1980, "median": 1980, "most": 1980}
    assert found["watts"]["median"] == 512.25 and "memory_mhz" not in found


def test_without_nvidia_smi_there_are_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with clocks.watched_clocks() as readings:
        pass
    assert readings == [] and clocks.summary(readings) == {} == clocks.read_clocks()


def test_the_suite_runs_its_parts_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    made = [
        gpu.Part("good", ["-c", "print('done')"], 60),
        gpu.Part("slow", sleeps[1:], 1),
        gpu.Part("ended", sleeps[1:], 60),
        gpu.Part("late", ["-c", ""], 60),
    ]
    monkeypatch.setattr(gpu, "parts", lambda options: iter(made))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"torch": "x"})
    arguments = ["--out", str(tmp_path / "out"), "--minutes", "0.1"]
    began = time.monotonic()
    assert run_command(gpu.main, arguments) == 1
    assert time.monotonic() - began < 30
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    ended = {part["name"]: part["ended"] for part in summary["parts"]}
    assert ended == {"good": 0, "slow": "timed out", "ended": "timed out", "late": "no time"}
    assert (tmp_path / "out/good.log").read_text() == "done\n"
    assert run_command(gpu.main, [*arguments, "--parts", "nothing"]) == 2
    assert "--parts nothing: there are good, slow" in capsys.readouterr().err


def test_the_suite_passes_what_is_named_on(tmp_path: Path) -> None:
    options = gpu.Options(out=tmp_path, data=Path("set.npz"), official=Path("clone"))
    named = {part.name: part.arguments for part in gpu.parts(options)}
    assert list(named)[:3] == ["verify", "tests", "step"]
    for name in ("step", "epoch"):
        assert named[name][named[name].index("--official") + 1] == "clone"
    assert "--official" not in named["step-wrn"] and "set.npz" in named["training"]
    assert "training" not in {part.name for part in gpu.parts(gpu.Options(out=tmp_path))}

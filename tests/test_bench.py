"""The tools of bench: what they do without a GPU, and that what needs one is said in one line."""

from __future__ import annotations

import os
import signal
import time
import warnings
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from made_graphs import patch_cuda
from no_sync import NoSync
from torch import Tensor

from bench import bench_epoch, bench_kernels, bench_step, gpu, host_time
from bench.baselines import PlainStep
from bench.ladder import COUNTS, RECORDED, Ladder, Rung, long_tailed_labels
from bench.records import Figure
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


@pytest.mark.parametrize("place", ["making ready", "a turn", "a capture"])
def test_a_ladder_that_is_asked_to_end_keeps_what_it_has(
    place: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []

    def end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def compiles() -> Any:
        if place == "a capture":  # which ends in an error of its own
            try:
                end()
            finally:
                raise RuntimeError("the capture was broken off")
        if place == "making ready":
            end()
        return lambda: steps.append("slow")

    def good() -> None:
        steps.append("good")
        if place == "a turn" and steps.count("good") == 4:  # two of them warm up
            end()

    rungs = [Rung("good", lambda: good), Rung("slow", compiles), Rung("late", lambda: good)]
    kept: list[Figure] = []
    monkeypatch.setattr(Ladder, "rungs", lambda self: iter(rungs[: 2 if place == "a turn" else 3]))
    monkeypatch.setattr(bench_step, "record", lambda figures, *_: kept.extend(figures))
    monkeypatch.setattr(bench_step, "matrix_rate", lambda device: 1e12)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    small = ["--model", "resnet8", "--batch-size", "4", "--size", "8", "--device", "cpu", "--keep"]
    assert run_command(bench_step.main, small) == 143
    names = {figure.what: figure.repeats for figure in kept}
    if place == "a turn":
        assert names == {"step: good": 1, "step: slow": 1}
    else:
        assert names == {"step: good": 1}
        shown = capsys.readouterr().out
        assert "late: left out, asked to end" in shown
        assert ("slow: failed" if place == "a capture" else "slow: left out, asked") in shown
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_torch_compile_records_is_ready_before_anything_is_captured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: list[str] = []

    def made(name: str) -> Rung:
        return Rung(name, lambda: lambda: steps.append(name))

    names = ["eager", "captured", "baseline, max-autotune", "official", "baseline, compiled"]
    monkeypatch.setattr(Ladder, "rungs", lambda self: iter([made(name) for name in names]))
    small = ["--model", "resnet8", "--batch-size", "4", "--size", "8", "--device", "cpu"]
    benchmark = torch.backends.cudnn.benchmark
    try:
        assert run_command(bench_step.main, [*small, "--repeats", "2"]) == 0
    finally:
        torch.backends.cudnn.benchmark = benchmark
    made_ready = [3 * [names[2]], 3 * [names[4]], *(2 * [names[i]] for i in (0, 1, 3))]
    assert steps == [*sum(made_ready, []), *names, *names]
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [next(name for name in names if row.startswith(name)) for row in rows] == names


def test_the_rungs_that_torch_compile_records_are_known_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes: list[Any] = []
    monkeypatch.setattr(PlainStep, "__init__", lambda self, *given: modes.append(given[-1]))
    ladder = Ladder(CPU, model="resnet8", batch_size=4, size=8, max_autotune=True)
    last = list(ladder._last_rungs())[-2:]
    assert [rung.name for rung in last] == list(RECORDED)
    for rung in last:
        rung.make()
    assert modes == ["reduce-overhead", "max-autotune"]
    ladder = Ladder(CPU, model="resnet8", batch_size=4, size=8)
    assert [rung.name for rung in ladder._last_rungs()][-1] == "baseline, compiled"


def test_a_captured_rung_is_a_replay_of_its_graph(
    ladder: Ladder, monkeypatch: pytest.MonkeyPatch
) -> None:
    replays: list[str] = []
    made = SimpleNamespace(replay=lambda: replays.append("replayed"))
    patch_cuda(monkeypatch, CUDAGraph=lambda: made, graph=lambda *_, **__: nullcontext())
    (rung,) = [rung for rung in ladder._gpu_rungs() if rung.name == "captured, tf32"]
    step = rung.make()
    assert replays == [] and list(ladder.captured) == [rung.name]
    step()
    assert replays == ["replayed"]


def test_an_epoch_is_timed_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "resnet8", "--largest", "50", "--test-images", "5", "--batch-size", "32"]
    benchmark = torch.backends.cudnn.benchmark
    try:
        arguments = [*small, "--steps", "1", "--repeats", "1", "--device", "cpu"]
        assert run_command(bench_epoch.main, arguments) == 0
    finally:
        torch.backends.cudnn.benchmark = benchmark
    assert "epoch: ours, evaluation in float32" in capsys.readouterr().out


def test_an_epoch_that_is_ended_keeps_what_was_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[str] = []

    def keep(figures: list[Any], *_: object) -> str:
        kept.extend(figure.what for figure in figures)
        return "the file"

    def end(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(bench_epoch, "record", keep)
    monkeypatch.setattr(bench_epoch, "_evaluation", end)
    small = ["--model", "resnet8", "--largest", "50", "--test-images", "5", "--batch-size", "32"]
    arguments = [*small, "--steps", "1", "--repeats", "1", "--device", "cpu", "--keep"]
    benchmark = torch.backends.cudnn.benchmark
    try:
        assert run_command(bench_epoch.main, arguments) == 128 + signal.SIGTERM
    finally:
        torch.backends.cudnn.benchmark = benchmark
    assert kept == ["epoch: ours, training"]
    assert "stopped: what does not stand above" in capsys.readouterr().out


def test_each_case_of_the_kernels_is_compiled_for_its_own_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes: list[torch.Size] = []

    def note(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        shapes.extend(given.shape for given in inputs if isinstance(given, Tensor))
        assert all(type(length) is int for shape in shapes for length in shape), shapes
        assert not any(isinstance(given, torch.SymInt) for given in inputs)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=note))
    sizes = range(2, 2 + 2 * torch._dynamo.config.recompile_limit)
    for size in sizes:
        images = torch.ones(size, 3)
        body = bench_kernels._body(lambda backend, given=images: given + 1, "compiled")
        assert torch.equal(body(), images + 1)
    assert shapes == [(size, 3) for size in sizes]


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

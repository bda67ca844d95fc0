"""The forms of the update: compiled and fused ones equal the eager one, or are refused."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from functools import partial
from typing import Any

import official_values as official
import pytest
import torch
from made_step import COUNTS, make_batch, make_model, make_noise
from torch import Tensor

from reat_fast.config import Config, parse
from reat_fast.engine import step_update
from reat_fast.engine.distributed import World
from reat_fast.engine.step_update import resolve_update_form
from reat_fast.kernels import own_conv, triton_support
from reat_fast.models import create_model
from reat_fast.step import TrainStep, make_optimizer


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch.compile run what it traced, forward and backward, without generating code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILED: dict[str, dict[str, Any]] = {
    "reat": {},
    "accumulate": {"accumulate": 3},
    "awp": {"awp": 0.005},
    "free": {"attack": "free", "replays": 2},
    "trades": {"objective": "trades", "tail": "none"},
    "train-mode attack": {"attack_batchnorm": "train"},
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_update_is_the_eager_one_with_its_running_statistics(
    name: str, traced: None
) -> None:
    images, labels = make_batch(torch.float64)
    results = []
    for form in ("eager", "compiled"):
        config = dataclasses.replace(
            Config(lr=0.125, update_form=form, batch_size=12),  # type: ignore[arg-type]
            **COMPILED[name],
        )
        model = make_model(torch.float64)
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        for k in range(2):
            outcome = step(images, labels, make_noise(images, k))
        results.append({**outcome, **dict(model.state_dict())})
    assert "stem.bn.running_var" in results[0]
    for key, expected in results[0].items():
        # Sums of a few hundred float64 terms, eps 2.2e-16, in another order, through two updates.
        torch.testing.assert_close(results[1][key], expected, rtol=1e-9, atol=1e-11, msg=key)


def test_a_compiled_update_in_bfloat16_is_near_the_eager_one(traced: None) -> None:
    images, labels = make_batch(size=32)
    losses = []
    for form in ("eager", "compiled"):
        config = Config(update_form=form, precision="bf16", steps=1)  # type: ignore[arg-type]
        model = make_model()
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        losses.append(step(images, labels, make_noise(images, 0))["loss"])
        assert all(tensor.dtype != torch.bfloat16 for tensor in model.state_dict().values())
    # A bfloat16 has 8 bits; what is traced rounds where the operators do.
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Have code generated for several threads, whatever number the tests were started with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs the C++ compiler g++")
def test_generated_code_updates_as_the_eager_form_does(two_threads: None) -> None:
    torch.compiler.reset()
    made, results = official.inputs(), []
    images, noise = made["images"].double(), made["noise"].double()
    for form in ("eager", "compiled"):
        model: Any = official.TinyNetwork().double()
        config = Config(update_form=form)  # type: ignore[arg-type]
        step = TrainStep(model, make_optimizer(model, config), official.COUNTS, config)
        for k in range(2):
            outcome = step(images, made["labels"], noise[k])
        results.append({**outcome, **dict(model.state_dict())})
    for key, expected in results[0].items():
        # As where the form is traced.
        torch.testing.assert_close(results[1][key], expected, rtol=1e-9, atol=1e-11, msg=key)


class Breaking(official.TinyNetwork):
    """A network that no compiler takes as a whole."""

    def forward_features_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        torch._dynamo.graph_break()
        return super().forward_features_logits(images)


def test_a_compiled_update_that_cannot_be_is_refused_in_one_line(
    traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--update-form compiled: the reference of --no-fused"):
        parse(["reat", "--no-fused", "--update-form", "compiled"], "reat")
    config, model = Config(update_form="compiled", steps=0), make_model()
    with pytest.raises(ValueError, match="--update-form compiled: works in one process"):
        monkeypatch.setattr(World, "take_from_main_", lambda self, tensors: None)
        TrainStep(model, make_optimizer(model, config), COUNTS, config, World(size=2))
    broken: Any = Breaking()
    step = TrainStep(broken, make_optimizer(broken, config), official.COUNTS, config)
    made = official.inputs()
    with pytest.raises(ValueError, match="--update-form compiled: this network cannot") as refused:
        step(made["images"], made["labels"], made["noise"][0])
    assert "\n" not in str(refused.value)


def test_a_fused_update_that_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(World, "take_from_main_", lambda self, tensors: None)
    with pytest.raises(ValueError, match="--update-form fused: the reference of --no-fused"):
        parse(["reat", "--no-fused", "--update-form", "fused"], "reat")
    config, model = Config(update_form="fused"), make_model()
    with pytest.raises(ValueError, match="--update-form fused: needs Triton and a CUDA device"):
        TrainStep(model, make_optimizer(model, config), COUNTS, config)
    with pytest.raises(ValueError, match="--update-form fused: .*; add --no-sync-batchnorm"):
        TrainStep(model, make_optimizer(model, config), COUNTS, config, World(size=2))


def test_the_update_is_fused_by_itself_where_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, alone = torch.device("cuda"), World()
    monkeypatch.setattr(own_conv, "why_not", lambda device: None)
    for capability, form in (((9, 0), "fused"), ((10, 0), "eager"), ((7, 5), "eager")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve_update_form(Config(), cuda, alone) == form
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_update_form(Config(), torch.device("cpu"), alone) == "eager"
    for precision in ("float32", "tf32"):
        assert resolve_update_form(Config(precision=precision), cuda, alone) == "eager"  # type: ignore[arg-type]
    assert resolve_update_form(Config(graph="off"), cuda, alone) == "eager"
    assert resolve_update_form(Config(fused=False), cuda, alone) == "eager"
    several = World(size=2)
    assert resolve_update_form(Config(), cuda, several) == "eager"
    assert resolve_update_form(Config(sync_batchnorm=False), cuda, several) == "fused"
    for named in ("eager", "compiled"):
        assert resolve_update_form(Config(update_form=named), cuda, alone) == named  # type: ignore[arg-type]


def test_the_update_of_others_networks_is_fused_on_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_update, "fused_update_pays", lambda device: True)
    monkeypatch.setattr(triton_support, "kernel_runs_on", lambda tensor: True)
    config = Config(precision="bf16")
    for hooked, update_form, form in (
        (False, "auto", "fused"),
        (True, "auto", "eager"),
        (True, "fused", "fused"),
    ):
        model = create_model("resnet8", len(COUNTS), width=8)
        if hooked:
            model.fc.register_forward_hook(lambda module, given, output: 2 * output)  # type: ignore[union-attr, operator]
        chosen = dataclasses.replace(config, update_form=update_form)  # type: ignore[arg-type]
        step = TrainStep(model, make_optimizer(model, chosen), COUNTS, chosen)
        assert step.update.form == form


class OwnBatchNorm(torch.nn.BatchNorm2d):
    """A BatchNorm that is not PyTorch's own, which is left alone."""


def test_an_update_that_has_nothing_to_fuse_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_update, "_require_fused", lambda *given: None)
    config = Config(update_form="fused")
    for changed, form in ((False, "fused"), (True, "eager")):
        model = make_model()
        for module in model.modules():
            if changed and type(module) is torch.nn.BatchNorm2d:
                module.__class__ = OwnBatchNorm
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        assert step.update.form == form


@pytest.mark.interpreter
@pytest.mark.parametrize("changes", [{}, {"awp": 0.01}, {"accumulate": 2}, {"precision": "bf16"}])
def test_a_fused_update_is_near_the_eager_one_with_its_running_statistics(
    changes: dict[str, Any],
) -> None:
    images, labels = make_batch()
    results = []
    for form in ("eager", "fused"):
        config = Config(lr=0.125, update_form=form, steps=1, **changes)  # type: ignore[arg-type]
        model = make_model()
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        outcome = step(images, labels, make_noise(images, 0))
        results.append({"loss": outcome["loss"], **model.state_dict()})
    # A bfloat16 has 8 bits, and PyTorch rounds before the residual sum as well.
    low = changes.get("precision") == "bf16"
    torch.testing.assert_close(results[1]["loss"], results[0]["loss"], rtol=0.01, atol=0)
    for key, expected in results[0].items():
        assert results[1][key].dtype == expected.dtype
        if not low or "running" in key:  # sums in another order
            atol = (0.02 if low else 1e-4) * float(expected.abs().max())
            torch.testing.assert_close(results[1][key], expected, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("flag", ["update_form", "attack_form"])
def test_a_missing_compiler_is_said_at_once(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    config = dataclasses.replace(Config(), **{flag: "compiled"})
    model = make_model()
    with pytest.raises(
        ValueError, match="form compiled: needs the C\\+\\+ compiler no-such-compil"
    ):
        TrainStep(model, make_optimizer(model, config), COUNTS, config)

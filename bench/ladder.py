"""The rungs of the ladder: the same training step on the same batch, from plain to fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar
from unittest import mock

import torch
from torch import Tensor

from bench.baselines import Mode, PlainStep
from bench.official import Official, as_loaded
from reat_fast.config import Config
from reat_fast.engine.captured_step import CapturedStep
from reat_fast.engine.memory import give_back_freed_memory, keep_freed_memory
from reat_fast.engine.precision import allowed_tf32, determinism
from reat_fast.engine.reference_step import ReferenceStep
from reat_fast.kernels import boxes, triton_support
from reat_fast.loaders import Batch
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.networks.frozen import DEFAULT_FORM, Form, fastest_form
from reat_fast.networks.fused_update import fused_update_pays
from reat_fast.step import TrainStep, make_optimizer

COUNTS = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
Labels = Literal["uniform", "long-tailed"]
Step = Callable[[], object]
Returned = TypeVar("Returned")

CAPTURED: tuple[Form, ...] = ("eager", "compiled", "cudnn", "triton")

RECORDED: dict[str, Mode] = {
    "baseline, compiled": "reduce-overhead",
    "baseline, max-autotune": "max-autotune",
}
"""Rungs that torch.compile records as CUDA graphs, and its mode. To be made ready before any other:
while it records, it frees the workspaces of cuBLAS, which graphs captured before still address."""

RECORDED_AFTER = 3
"""Steps after which such a rung only replays: torch.compile warms up, records and replays."""


def default_rung(device: torch.device) -> str:
    """Name the rung that training takes on a GPU unless told otherwise."""
    name = f"captured, {fastest_form(torch.bfloat16, device)}"
    return f"{name}, fused update" if fused_update_pays(device) else name


@dataclass(frozen=True)
class Rung:
    """One way of taking the step: what makes it ready, and the arithmetic of its network."""

    name: str
    make: Callable[[], Step]
    dtype: str = "float32"


@dataclass(frozen=True)
class Kind:
    """What makes a TrainStep one rung or another."""

    reference: bool = False
    folded: bool = True
    channels_last: bool = True
    form: Form = DEFAULT_FORM
    precision: Any = "float32"
    update_form: Any = "eager"


class Unfolded:
    """The attack on the network itself in eval mode, with the face of FrozenNetwork."""

    def __init__(self, model: Network) -> None:
        self.model = model

    def refresh(self) -> None:
        """Nothing to take up: the weights are the network's own."""

    def __call__(self, images: Tensor) -> Tensor:
        self.model.eval()
        logits: Tensor = self.model(images)
        self.model.train()
        return logits


@contextmanager
def pytorch_forms() -> Iterator[None]:
    """Let every op take its PyTorch form on a GPU too."""
    with mock.patch.object(triton_support, "TRITON_INSTALLED", False):
        yield


class Ladder:
    """The rungs that a device can take, made one at a time.

    model, steps: network and steps of the attack; size: height and width of the images; labels:
    drawn evenly, or as they occur in training, where the plain forms of the tail penalty loop over
    fewer samples. official: a clone of the official code. max_autotune: whether to add the rung
    that compiles for minutes.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        model: str = "resnet18",
        batch_size: int = 128,
        size: int = 32,
        steps: int = 10,
        labels: Labels = "uniform",
        official: Path | None = None,
        max_autotune: bool = False,
    ) -> None:
        made = torch.Generator().manual_seed(0)
        shape = (batch_size, size, size, 3)
        images = torch.randint(0, 256, shape, generator=made, dtype=torch.uint8)
        drawn = torch.randint(0, 10, (batch_size,), generator=made)
        if labels == "long-tailed":
            drawn = long_tailed_labels(batch_size)
        indices = torch.arange(batch_size, device=device)
        self.batch = Batch(images.to(device), drawn.to(device), indices, gather=True)
        self.captured: dict[str, CapturedStep] = {}
        self._device, self._model, self._max_autotune = device, model, max_autotune
        self._config = Config(steps=steps, lr=1e-3)
        self._official: Official | None = None
        if official is not None:
            self._official = Official(official, model, COUNTS, self._config, device)
            self._on_host = as_loaded(images), drawn

    def rungs(self) -> Iterator[Rung]:
        """Yield the rungs, from the plainest on; RECORDED come last here, but are made first."""
        on_gpu = self._device.type == "cuda"
        reference = Kind(reference=True, channels_last=False)
        yield Rung("loop reference", lambda: _as_scripts_run(self._eager(reference)))
        if not on_gpu:
            yield Rung("memory kept", lambda: self._eager(reference))
        plain = Kind(folded=False, channels_last=False)
        yield Rung("eager", lambda: self._plain(plain))
        yield Rung("channels_last", lambda: self._plain(Kind(folded=False)))
        yield Rung("folded", lambda: self._plain(Kind()))
        yield Rung("folded, compiled", lambda: self._plain(Kind(form="compiled")))
        if on_gpu:
            yield Rung("folded, cudnn", lambda: self._plain(Kind(form="cudnn")))
            yield from self._gpu_rungs()
            yield Rung("baseline, eager", lambda: self._baseline(None), "bfloat16")
            if (official := self._official) is not None:
                yield Rung("official", lambda: lambda: official.step(*self._on_host), "tf32")
            yield from self._last_rungs()
        else:
            yield Rung("folded, cpu", lambda: self._plain(Kind(form="cpu")))
            yield Rung("folded, bf16", lambda: self._plain(Kind(precision="bf16")), "bfloat16")
            yield Rung("folded, deterministic", lambda: self._deterministic(Kind()))

    def _gpu_rungs(self) -> Iterator[Rung]:
        low = Kind(precision="bf16", form="cudnn")
        yield Rung("kernels", lambda: self._eager(Kind()))
        yield Rung("kernels, bf16", lambda: self._eager(replace(low, form="eager")), "bfloat16")
        for form in CAPTURED:
            if form != "triton" or boxes.why_not(self._device) is None:
                yield self._replayed(f"captured, {form}", replace(low, form=form))
        yield self._replayed("captured, tf32", Kind(precision="tf32"))

    def _last_rungs(self) -> Iterator[Rung]:
        form = fastest_form(torch.bfloat16, self._device)
        low, default = Kind(precision="bf16", form=form), f"captured, {form}"
        name = f"{default}, deterministic"
        yield Rung(name, lambda: _under(determinism, lambda: self._capture(name, low)), "bfloat16")
        own: tuple[Form, ...] = ("triton",) if boxes.why_not(self._device) is None else ()
        for one in dict.fromkeys((form, *own)):
            fused = replace(low, form=one, update_form="fused")
            yield self._replayed(f"captured, {one}, fused update", fused)
        update = replace(low, update_form="compiled")
        yield self._replayed(f"{default}, compiled update", update)
        whole = replace(update, form="compiled")
        yield self._replayed("captured, compiled, compiled update", whole)
        for name, mode in RECORDED.items():
            if mode != "max-autotune" or self._max_autotune:
                yield Rung(name, partial(self._baseline, mode), "bfloat16")

    def _network(self, channels_last: bool) -> Network:
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = create_model(self._model, len(COUNTS))
        return model.to(self._device, memory_format=layout)  # type: ignore[call-overload, no-any-return]

    def _step(self, kind: Kind) -> TrainStep:
        model = self._network(kind.channels_last)
        config = replace(
            self._config,
            precision=kind.precision,
            attack_form=kind.form,
            update_form=kind.update_form,
        )
        make = ReferenceStep if kind.reference else TrainStep
        step = make(model, make_optimizer(model, config), COUNTS, config)
        if not kind.folded:
            step.attack.network = Unfolded(model)  # type: ignore[assignment]
        return step

    def _eager(self, kind: Kind) -> Step:
        step = self._step(kind)
        return lambda: step.train_on(self.batch)

    def _plain(self, kind: Kind) -> Step:
        step = self._eager(kind)
        on_gpu = self._device.type == "cuda"
        return (lambda: _under(pytorch_forms, step)) if on_gpu else step

    def _deterministic(self, kind: Kind) -> Step:
        step = self._eager(kind)
        return lambda: _under(determinism, step)

    def _replayed(self, name: str, kind: Kind) -> Rung:
        dtype = "tf32" if kind.precision == "tf32" else "bfloat16"
        return Rung(name, lambda: self._capture(name, kind), dtype)

    def _capture(self, name: str, kind: Kind) -> Step:
        with allowed_tf32(kind.precision == "tf32"):
            replayed = CapturedStep(self._step(kind), self.batch)
        self.captured[name] = replayed
        # Not the method alone: a call holds the step, whose memory the graph reads.
        return lambda: replayed._whole.graph.replay()

    def _baseline(self, mode: Mode | None) -> Step:
        return PlainStep(self._network(True), self.batch, COUNTS, self._config, mode)


def long_tailed_labels(count: int) -> Tensor:
    """Return labels int64 [count] of which each class has its share of the training set."""
    bounds = torch.tensor(COUNTS).double().cumsum(0) / sum(COUNTS)
    places = (torch.arange(count).double() + 0.5) / count
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.bucketize(places, bounds, right=True)[mixed]


def _under(setting: Callable[[], Any], call: Callable[[], Returned]) -> Returned:
    with setting():
        return call()


def _as_scripts_run(step: Step) -> Step:
    """Let a step run with the memory settings that a process has by itself."""

    def call() -> object:
        give_back_freed_memory()
        try:
            return step()
        finally:
            keep_freed_memory()

    return call

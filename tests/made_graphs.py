"""CUDA graphs that the recorded body plays itself: what the tests of captures share on a CPU.

They do what a graph does to the state: capturing executes nothing that lasts, replaying runs the
body on the static buffers. tests/test_gpu.py has real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from reat_fast.engine import captured_step
from reat_fast.engine.captured_step import Recording

replays: list[int] = []
"""How many images each replay of a StepGraph was on."""


class StepGraph:
    """A graph of a training step."""

    recording: Recording

    def replay(self) -> None:
        replays.append(self.recording.total)
        outcome = self.recording.body()
        for name, tensor in self.recording.outcome.items():
            tensor.copy_(outcome[name])

    def pool(self) -> object:
        return self

    def reset(self) -> None:
        del self.recording


class PassGraph:
    """A graph of an evaluation, of one outcome; `body` and `outcome` are set when it is made."""

    body: Callable[[], Tensor]
    outcome: Tensor
    shares: PassGraph | None = None

    def __init__(self) -> None:
        self.replays, self.open = 0, True

    def replay(self) -> None:
        assert self.open
        self.replays += 1
        self.outcome.copy_(self.body())

    def pool(self) -> PassGraph:
        return self

    def reset(self) -> None:
        self.open = False


def patch_cuda(monkeypatch: pytest.MonkeyPatch, **graphs: object) -> None:
    """Put stand-ins in the place of graphs, as given, and of streams, which do nothing."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda *device: stream,
        "current_stream": lambda: stream,
        "set_stream": lambda s: None,
        "stream": lambda s: nullcontext(),
        "synchronize": lambda: None,
    }
    monkeypatch.setattr(captured_step, "attack_stream", lambda device: None)  # it would be kept
    for name, fake in {**fakes, **graphs}.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def step_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let training steps be captured on the CPU."""

    @contextmanager
    def capture(fake: StepGraph, pool: object, *_: object, **__: object) -> Iterator[None]:
        assert pool is None or pool.recording.total > fake.recording.total  # type: ignore[attr-defined]
        state = fake.recording.step.state_tensors()
        kept = [tensor.clone() for tensor in state]
        yield
        for tensor, value in zip(state, kept, strict=True):
            tensor.copy_(value)

    warm_up = captured_step.warm_up

    def noted(body: Any, stream: Any) -> None:
        body.__self__.graph.recording = body.__self__
        warm_up(body, stream)

    patch_cuda(monkeypatch, CUDAGraph=StepGraph, graph=capture)
    monkeypatch.setattr(captured_step, "warm_up", noted)
    replays.clear()

"""The whole training step in one CUDA graph: warm up, capture, replay.

The body is TrainStep.train_on, unchanged. What varies between replays lives in memory with fixed
addresses: the batch is copied into named buffers, learning rate, epoch, counts and sums are tensors
the graph reads and writes. What a replay cannot take raises; nothing falls back in silence.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from reat_fast.loaders import Batch
from reat_fast.step import TrainStep

# Libraries choose algorithms and make their workspaces, and kernels are compiled, in the first
# steps; a capture must find all of that done.
WARM_UP_STEPS = 3

Outcome = TypeVar("Outcome")


class CapturedStep:
    """Replay a TrainStep on batches of one shape from one loader.

    step: the step to capture, its optimiser's learning rate a tensor on the device and its state
    loaded before: loading replaces memory that the graph would go on using. batch: any whole
    batch of the loader, on a CUDA device; its values do not matter. total: images of the whole
    batch where each process has a share of it. The warm-up is undone.
    Errors: ValueError for what cannot be captured.
    """

    def __init__(self, step: TrainStep, batch: Batch, total: int | None = None) -> None:
        for group in step.optimizer.param_groups:
            if not isinstance(group["lr"], Tensor):
                raise ValueError("a captured step needs a learning rate that is a tensor")
        self.step = step
        self._images = batch.images if batch.gather else batch.images.clone()
        self._labels = batch.labels.clone()
        self._indices = batch.indices.clone()
        self._total = len(batch.labels) if total is None else total
        self._static = Batch(self._images, self._labels, self._indices, gather=batch.gather)
        self._settings = baked_settings()
        self._graph = torch.cuda.CUDAGraph()
        self._capture()

    def train_on(self, batch: Batch, total: int | None = None) -> dict[str, Tensor]:
        """Take a step, by a replay where the batch has the captured shape.

        A shorter batch, as an epoch may end with, takes the same body eagerly: masking it would
        change the batch statistics. Returns what TrainStep returns, in memory that the next
        replay overwrites.
        Errors: ValueError for another shape, dtype, device, loader or setting.
        """
        total = len(batch.labels) if total is None else total
        if total < self._total:  # not the share: all processes have to agree on a replay
            return self.step.train_on(batch, total)
        self._refuse_changes(batch)
        if not batch.gather:
            self._images.copy_(batch.images, non_blocking=True)
        self._labels.copy_(batch.labels, non_blocking=True)
        self._indices.copy_(batch.indices, non_blocking=True)
        self._graph.replay()
        return self._outcome

    def close(self) -> None:
        """Free the graph and its memory; call before the process group or the device goes."""
        torch.cuda.synchronize()
        self._graph.reset()

    def _capture(self) -> None:
        self.step.allocate(self._images[:1].permute(0, 3, 1, 2).float())
        state = self.step.state_tensors()
        kept = [tensor.clone() for tensor in state]
        places = [tensor.data_ptr() for tensor in state]
        stream = torch.cuda.Stream()
        warm_up(self._body, stream)
        with torch.no_grad():
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)
        del kept
        # The threads of a loader may allocate meanwhile, which is no part of the step.
        self._outcome = record(self._graph, self._body, stream, "thread_local")
        assert places == [tensor.data_ptr() for tensor in state], "state moved during the capture"

    def _body(self) -> dict[str, Tensor]:
        return self.step.train_on(self._static, self._total)

    def _refuse_changes(self, batch: Batch) -> None:
        static = self._static
        if batch.gather != static.gather or (
            batch.gather and batch.images.data_ptr() != static.images.data_ptr()
        ):
            raise ValueError("the step was captured with another loader: capture it again")
        for name in ("images", "labels", "indices"):
            given, fixed = getattr(batch, name), getattr(static, name)
            for what in ("shape", "dtype", "device"):
                if getattr(given, what) != getattr(fixed, what):
                    raise ValueError(
                        f"{name} have {what} {getattr(given, what)}, the step was captured with "
                        f"{getattr(fixed, what)}: capture it again"
                    )
        refuse_changed_settings(self._settings)


def warm_up(body: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Run a body a few times on the stream on which it is going to be captured, and wait for it.

    One side stream for both: autograd remembers the stream on which it first met a weight.
    """
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            body()
    torch.cuda.synchronize()


def record(
    graph: torch.cuda.CUDAGraph,
    body: Callable[[], Outcome],
    stream: torch.cuda.Stream,
    error_mode: str = "global",
) -> Outcome:
    """Capture a body that was warmed up on `stream`; return what it returned, which replays fill.

    error_mode: whose forbidden calls end the capture, see torch.cuda.graph.
    Errors: RuntimeError for a body that cannot be captured.
    """
    gc.collect()  # a tensor freed during the capture would be freed in the graph's pool
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode=error_mode):
            outcome = body()
    finally:
        torch.cuda.set_stream(before)  # where ending a capture fails, it stays on its own stream
    before.wait_stream(stream)
    return outcome


def baked_settings() -> tuple[object, ...]:
    """Return the settings that a graph keeps as they were when it was captured."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
    )


def refuse_changed_settings(baked: tuple[object, ...]) -> None:
    """Raise ValueError unless baked_settings() are those given."""
    if baked_settings() != baked:
        raise ValueError("TF32, cuDNN or determinism settings changed since the capture")

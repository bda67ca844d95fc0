"""The whole training step in one CUDA graph: warm up, capture, replay.

The body is TrainStep.train_on, unchanged. What varies between replays lives in memory with fixed
addresses: the batch is copied into named buffers, learning rate, epoch, counts and sums are tensors
the graph reads and writes. What a replay cannot take raises; nothing falls back in silence.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from reat_fast.cli.terminal import first_line
from reat_fast.engine.graph import (
    attack_stream,
    baked_settings,
    record,
    refuse_changed_settings,
    warm_up,
)
from reat_fast.loaders import Batch
from reat_fast.step import TrainStep


class CapturedStep:
    """Replay a TrainStep on batches of one loader.

    step: the step to capture, its optimiser's learning rate a tensor on the device, its momentum in
    place and its state loaded before: loading replaces memory that the graph would go on using.
    batch: any whole batch of the loader, on a CUDA device; its values do not matter. total: images
    of the whole batch where each process has a share of it. The warm-up is undone.
    Errors: ValueError for what cannot be captured.
    """

    def __init__(self, step: TrainStep, batch: Batch, total: int | None = None) -> None:
        for group in step.optimizer.param_groups:
            rate = group["lr"]
            if not isinstance(rate, Tensor) or rate.device != step.epoch.device:
                raise ValueError(
                    "a captured step needs a learning rate that is a tensor on its device"
                )
        self.step = step
        self._settings = baked_settings()
        self._kind = step.kind
        self._stream = _step_stream(batch.labels.device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        total = len(batch.labels) if total is None else total
        self._whole = self._recorded(batch, total)
        self._short: Recording | None = None
        self._met: int | None = None
        """The size of the last shorter batch that was launched."""
        self._whole_only = False

    def train_on(self, batch: Batch, total: int | None = None) -> dict[str, Tensor]:
        """Take a step: replay that of a whole batch, or of the shorter one that ends an epoch.

        The shorter one is a graph of its own, as masking it would change the batch statistics: it
        is launched by its kernels in the first epoch and recorded in the second. Returns what
        TrainStep returns, in memory that the next replay overwrites.
        Errors: ValueError for another shape, dtype, device, loader or setting, and where outdated.
        """
        if self.outdated:
            raise ValueError("another step begins with this epoch: capture it again")
        total = len(batch.labels) if total is None else total
        recording = self._whole
        if total < self._whole.total:  # not the share: all processes have to agree on a replay
            shorter = self._shorter(batch, total)
            if shorter is None:
                return self.step.train_on(batch, total)
            recording = shorter
        recording.refuse_changes(batch)
        refuse_changed_settings(self._settings)
        return recording.replay(batch)

    @property
    def outdated(self) -> bool:
        """Whether the epoch that began takes another step: capture it again."""
        return self.step.kind != self._kind

    def close(self) -> None:
        """Free the graphs and their memory; call before the process group or the device goes."""
        torch.cuda.synchronize()
        for graph in self._graphs:
            graph.reset()

    def _recorded(self, batch: Batch, total: int) -> Recording:
        # Kept where this fails too: a graph that goes takes the cuBLAS workspace of its stream
        # along, on which the others count.
        self._graphs.append(torch.cuda.CUDAGraph())
        beside = self._graphs[0] if len(self._graphs) > 1 else None
        return Recording(self.step, batch, total, self._graphs[-1], self._stream, beside)

    def _shorter(self, batch: Batch, total: int) -> Recording | None:
        """Return the recording for a shorter batch, or None for one that is to be launched."""
        if self._short is not None and self._short.total == total:
            return self._short
        again, self._met = total == self._met, total
        # A process without images has nothing to record, and then none may replay.
        if self._whole_only or self._short or not again or total < self.step.world.size:
            return None
        try:
            self._short = self._recorded(batch, total)
        except RuntimeError as error:
            if self.step.world.size > 1:  # the others go on to replay
                raise
            self._whole_only = True
            warnings.warn(
                f"the step on the last {total} images of an epoch cannot be captured as a CUDA "
                f"graph ({first_line(error)}); it is launched kernel by kernel",
                stacklevel=2,
            )
        return self._short


class Recording:
    """The graph of one step on batches of one shape, and the named buffers it reads."""

    def __init__(
        self,
        step: TrainStep,
        batch: Batch,
        total: int,
        graph: torch.cuda.CUDAGraph,
        stream: torch.cuda.Stream,
        beside: torch.cuda.CUDAGraph | None = None,
    ) -> None:
        images = batch.images if batch.gather else batch.images.clone()
        self.step, self.total = step, total
        self.batch = Batch(images, batch.labels.clone(), batch.indices.clone(), batch.gather)
        self.graph = graph
        step.allocate(images[:1].permute(0, 3, 1, 2).to(step.dtype))
        state = step.state_tensors()
        kept = [tensor.clone() for tensor in state]
        places = [tensor.data_ptr() for tensor in state]
        slots = step.optimizer.state
        begun = {parameter for parameter in slots if slots[parameter]}
        try:
            warm_up(self.body, stream)
        finally:
            with torch.no_grad():
                for tensor, value in zip(state, kept, strict=True):
                    tensor.copy_(value)
            made = [slots.pop(parameter) for parameter in set(slots) - begun]
        del kept
        if any(made):
            raise ValueError(
                f"optimizer: {type(step.optimizer).__name__} makes its state in its first step, "
                "which no replay can do; take that of make_optimizer, or the first step by "
                "TrainStep.train_on"
            )
        # The threads of a loader may allocate meanwhile, which is no part of the step. Graphs that
        # take turns on one stream can share a pool: what lives on, outcomes and state, is held.
        self.outcome = record(self.graph, self.body, stream, "thread_local", beside)
        assert places == [tensor.data_ptr() for tensor in step.state_tensors()], "state moved"

    def body(self) -> dict[str, Tensor]:
        """Take the step on the buffers."""
        return self.step.train_on(self.batch, self.total)

    def replay(self, batch: Batch) -> dict[str, Tensor]:
        """Take the step on a batch; returns memory that the next replay overwrites."""
        if not batch.gather:
            self.batch.images.copy_(batch.images, non_blocking=True)
        copy_positions_(self.batch, batch)
        self.graph.replay()
        return self.outcome

    def refuse_changes(self, batch: Batch) -> None:
        """Raise ValueError for a batch that does not fit the buffers."""
        static = self.batch
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


def copy_positions_(static: Batch, batch: Batch) -> None:
    """Copy labels and indices into the buffers of a graph, in one launch for both.

    But for the launch of the graph these are what a step costs the host.
    """
    torch._foreach_copy_([static.labels, static.indices], [batch.labels, batch.indices])


def _step_stream(device: torch.device) -> torch.cuda.Stream:
    stream = torch.cuda.Stream(device)  # from a pool of 32, one after another
    return torch.cuda.Stream(device) if stream == attack_stream(device) else stream

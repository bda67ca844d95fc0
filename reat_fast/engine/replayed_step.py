"""Training steps as fast as their device takes them: replayed on a GPU, launched on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.cli.terminal import first_line
from reat_fast.engine.captured_step import CapturedStep
from reat_fast.engine.graph import can_capture
from reat_fast.loaders import Batch
from reat_fast.step import TrainStep


class ReplayedStep:
    """Take the steps of a TrainStep, on a GPU from one CUDA graph.

    The graph is captured at the first batch of config.batch_size images, and again in the epoch in
    which another step begins (--attack-from, --awp-from). On a CPU, with --graph off and with
    --no-fused steps are launched as TrainStep.train_on does.
    """

    def __init__(self, step: TrainStep) -> None:
        self.step = step
        self._captured: CapturedStep | None = None

    @property
    def captures(self) -> bool:
        """Whether steps are replayed from a CUDA graph."""
        config = self.step.config
        return can_capture(self.step.epoch.device) and config.fused and config.graph != "off"

    def train_on(self, batch: Batch, total: int | None = None) -> dict[str, Tensor]:
        """Take a step on a batch of a loader; returns what TrainStep does, until the next step.

        total: images of the whole batch where this process has a share of it.
        Errors: ValueError where the step cannot be captured, and for batches of another loader.
        """
        total = len(batch.labels) if total is None else total
        if self._captured is not None and self._captured.outdated:
            self.forget()
        whole = total == self.step.config.batch_size
        if self._captured is None and self.captures and whole:
            self._captured = self._capture(batch, total)
        return (self._captured or self.step).train_on(batch, total)

    def forget(self) -> None:
        """Free the graph: before weights or optimiser are loaded, and at the end.

        The next step captures another.
        """
        if self._captured is not None:
            self._captured.close()
            self._captured = None

    def _capture(self, batch: Batch, total: int) -> CapturedStep:
        try:
            return CapturedStep(self.step, batch, total)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = first_line(error)
            raise ValueError(
                f"--graph {self.step.config.graph}: the step cannot be captured ({reason}); "
                "go on with --graph off"
            ) from error

"""The passes of an attacked network from CUDA graphs: its logits, and gradients by the images.

A search of AutoAttack decides after each step which images go on, so no graph can hold it. What
takes the time are the passes of the network, and launching their kernels one by one takes longer
than running them on less than some thousand images. They are captured for each size of a batch that
lasts: the forward, and the backward from a gradient by the logits, so that all losses share them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.attack import Classifier
from reat_fast.cli.terminal import first_line
from reat_fast.engine.graph import (
    WARM_UP_STEPS,
    attack_stream,
    record,
    refuse_waiting,
    warm_up,
)

Objective = Callable[[Tensor], Tensor]
"""A number for each image [B], of the logits [B, K]."""

FIRST_LAUNCHES = WARM_UP_STEPS + 2
"""Passes at one size that are launched: as many as capturing them takes."""


class RecordedPasses:
    """Replay the passes of one network on batches of one size.

    network: its weights constant. images [B, C, H, W]: a whole batch on a CUDA device, whose values
    do not matter. beside: others of the same search, whose memory these share.
    Errors: RuntimeError for a network that cannot be captured.
    """

    def __init__(
        self, network: Classifier, images: Tensor, beside: RecordedPasses | None = None
    ) -> None:
        self._network = network
        self._images = images.detach().clone().requires_grad_()
        stream = attack_stream(images.device)
        warm_up(self._launch, stream)
        with torch.cuda.stream(stream):
            refuse_waiting(self._launch)
        self.graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        forward, backward = self.graphs
        shared = None if beside is None else beside.graphs[0]
        self._logits = record(forward, self._forward, stream, "thread_local", shared)
        self._by_logits = torch.zeros_like(self._logits)
        self._gradient = record(backward, self._backward, stream, "thread_local", shared or forward)
        # The maps between the two are free again, for the graphs of another size.
        self._logits = self._logits.detach()

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits [B, K] of images [B, C, H, W], of at most the size of the batch."""
        self._take(images)
        return self._logits[: len(images)].clone()

    def gradient(self, images: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, K], objective(logits) [B] and its gradient by the images."""
        self._take(images)
        logits = self._logits[: len(images)].clone().requires_grad_()
        with torch.enable_grad():
            values = objective(logits)
        (by_logits,) = torch.autograd.grad(values, logits, torch.ones_like(values))
        # The rows of images that are no longer there are computed too, and looked at by nobody.
        self._by_logits[: len(images)] = by_logits
        self.graphs[1].replay()
        return logits.detach(), values.detach(), self._gradient[: len(images)].clone()

    def _take(self, images: Tensor) -> None:
        self._images.detach()[: len(images)] = images
        self.graphs[0].replay()

    def _forward(self) -> Tensor:
        with torch.enable_grad():
            return self._network(self._images)

    def _backward(self) -> Tensor:
        (gradient,) = torch.autograd.grad(self._logits, self._images, self._by_logits)
        return gradient

    def _launch(self) -> None:
        logits = self._forward()
        torch.autograd.grad(logits, self._images, torch.zeros_like(logits))


class Replays:
    """The recorded passes of a search, one pair of graphs for each network and size of a batch."""

    def __init__(self) -> None:
        self._met: Counter[tuple[int, int]] = Counter()
        self._recorded: dict[tuple[int, int], RecordedPasses] = {}
        self._failed = False

    def of(self, network: Classifier, key: object, images: Tensor) -> RecordedPasses | None:
        """Return the passes of a network that take images [B, C, H, W], or None: launch them.

        So are those of a size that has just been met: it may not last. key: what the network is
        known by, which lives as long as this.
        """
        known = id(key), filled_size(len(images))
        if known not in self._recorded and not self._failed:
            self._met[known] += 1
            if self._met[known] > FIRST_LAUNCHES:
                self._record(known, network, images)
        return self._recorded.get(known)

    def close(self) -> None:
        """Free the graphs and their memory."""
        if self._recorded:
            torch.cuda.synchronize()
            for passes in self._recorded.values():
                for graph in passes.graphs:
                    graph.reset()
            self._recorded.clear()
            torch.cuda.empty_cache()

    def _record(self, known: tuple[int, int], network: Classifier, images: Tensor) -> None:
        beside = next(iter(self._recorded.values()), None)
        try:
            self._recorded[known] = RecordedPasses(network, filled_up(images), beside)
        except RuntimeError as error:
            self._failed = True
            torch.cuda.synchronize()  # what was begun in vain writes to memory that is freed now
            self.close()  # a graph that goes takes the cuBLAS workspace of all on its stream along
            warnings.warn(
                f"AutoAttack: a pass of the network cannot be captured as a CUDA graph "
                f"({first_line(error)}); kernels are launched one by one, which is slower",
                stacklevel=2,
            )


def filled_size(images: int) -> int:
    """Return one of four sizes per power of two, from 16 on, that holds so many images."""
    part = max(1 << max(images.bit_length() - 3, 0), 4)
    return -(-images // part) * part


def filled_up(images: Tensor) -> Tensor:
    """Fill a batch [B, C, H, W] up with zeros to its filled_size.

    The batches of AutoAttack shrink, and cuDNN plans its fused convolutions anew for each size.
    """
    return F.pad(images, (0, 0, 0, 0, 0, 0, 0, filled_size(len(images)) - len(images)))

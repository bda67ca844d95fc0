"""Ways to bring long-tailed batches to the device, all with the same protocol.

A loader knows which images to show and in which order. It gives them as uint8 with their positions
in the training set; augmentation and the random start are the step's, keyed by those positions, so
every loader trains on the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A batch as a loader gives it, on the device.

    images: uint8 [B, H, W, C], or the whole set [N, H, W, C] where gather is true and the step
    takes the rows `indices`. labels int64 [B]. indices int64 [B]: positions in the training set.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    gather: bool


class Loader(Protocol):
    """The protocol of every loader."""

    def __len__(self) -> int:
        """Return the batches of an epoch."""
        ...

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Give the batches of one epoch, in the order that (seed, epoch) fixes."""
        ...

"""Ways to bring long-tailed batches to the device, all with the same protocol.

A loader is made of an image set, an `EpochOrder` and a device, and gives the images as uint8 with
their positions in the training set; augmentation and the random start are the step's, keyed by
those positions, so every loader trains on the same pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from reat_fast.loaders.order import EpochOrder


@dataclass(frozen=True)
class Batch:
    """A batch as a loader gives it, on the device.

    images: uint8 [B, H, W, C], or the whole set [N, H, W, C] where gather is true and the step
    takes the rows `indices`. labels int64 [B]. indices int64 [B]: what the random numbers of each
    image are drawn by, its position in the training set or, where a sampler may draw it several
    times, that of the draw in the epoch.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    gather: bool


class Loader(Protocol):
    """The protocol of every loader."""

    order: EpochOrder

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch from batch `first` on; the iterator may be abandoned.

        Loaders that read ahead read one epoch at a time. A batch may be empty where there are more
        ranks than images left. Raises ValueError where an image cannot be read, and where a later
        epoch was begun meanwhile.
        """
        ...

    def close(self) -> None:
        """End the processes and threads of the loader; it may be closed twice, not used again."""
        ...

"""The whole set on the device as uint8: a batch is a vector of positions, and nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reat_fast.data import ImageSet
from reat_fast.kernels.philox import permutation
from reat_fast.loaders import Batch


class ResidentLoader:
    """Give batches of a set that lives on the device.

    The order of an epoch is a permutation drawn from (seed, epoch). drop_last leaves out a last
    batch that is short, which the official recipe does not.
    """

    def __init__(
        self,
        image_set: ImageSet,
        batch_size: int,
        device: torch.device,
        *,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        self.images = torch.from_numpy(image_set.images).to(device)
        self.labels = torch.from_numpy(image_set.labels).to(device)
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last

    def __len__(self) -> int:
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """Give the batches of one epoch."""
        order = permutation(len(self.labels), self.seed, epoch, self.labels.device)
        labels = self.labels[order]
        for batch in range(len(self)):
            rows = slice(batch * self.batch_size, (batch + 1) * self.batch_size)
            yield Batch(self.images, labels[rows], order[rows], gather=True)

"""Which images an epoch shows, in which order, and which of them each process takes.

An order is a function of (seed, epoch) and of integer arithmetic alone, so it is the same on every
device, from every loader, for every number of processes and after every resumption.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reat_fast.kernels.philox import SAMPLER, permutation, random_bits

SAMPLERS = ("instance", "class-balanced", "square-root", "effective", "progressive")
"""instance shows each image once an epoch; the others draw with replacement, class first."""


class EpochOrder:
    """Say which images an epoch shows, in which order, and which of them this rank takes.

    labels: int64 [N]. batch_size: images per step of all ranks together; each rank takes a
    contiguous share of every batch, sizes differing by at most one. sampler: one of SAMPLERS, see
    `class_probabilities`; epochs is the length of the run, which only progressive uses.
    drop_last leaves out a last batch that is short.
    Raises ValueError for an unknown sampler and for sizes that leave a rank without images.
    """

    def __init__(
        self,
        labels: Tensor | npt.NDArray[np.int64],
        batch_size: int,
        *,
        sampler: str = "instance",
        seed: int = 0,
        epochs: int = 1,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        known = torch.as_tensor(labels, device="cpu")
        _check(len(known), batch_size, sampler, drop_last, rank, world)
        self.batch_size, self.sampler, self.seed, self.epochs = batch_size, sampler, seed, epochs
        self.drop_last, self.rank, self.world = drop_last, rank, world
        self.device = torch.device("cpu")
        self._counts = torch.bincount(known)  # [C]
        self._by_class = torch.argsort(known, stable=True)  # [N], positions, class by class

    def __len__(self) -> int:
        """Return the batches of an epoch, the same number for every rank."""
        whole, rest = divmod(len(self._by_class), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    @property
    def share(self) -> int:
        """Images of a full batch that this rank takes."""
        return self.batch_size // self.world + (self.rank < self.batch_size % self.world)

    def to(self, device: torch.device) -> EpochOrder:
        """Return the same order, drawn on another device."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def indices(self, epoch: int) -> Tensor:
        """Return the positions that an epoch shows, of all ranks: int64 [N]."""
        if self.sampler == "instance":
            return permutation(len(self._by_class), self.seed, epoch, self.device)
        return self._draw(epoch)

    def batches(self, epoch: int, first: int = 0) -> Iterator[Tensor]:
        """Give this rank's positions in each batch, int64, from batch `first` on.

        A last batch smaller than the number of ranks leaves some an empty share.
        """
        return self.split(self.indices(epoch), first)

    def places(self, first: int = 0) -> Iterator[Tensor]:
        """Give the places in an epoch, int64, of what `batches` gives."""
        return self.split(torch.arange(len(self._by_class), device=self.device), first)

    def split(self, shown: Tensor, first: int = 0) -> Iterator[Tensor]:
        """Give what this rank takes of each batch, from batch `first` on, of what is shown [N]."""
        for batch in range(first, len(self)):
            rows = shown[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield rows.tensor_split(self.world)[self.rank]

    def _draw(self, epoch: int) -> Tensor:
        """Draw N positions: the first word of each chooses the class, the second the image."""
        share = class_probabilities(self._counts.numpy(), self.sampler, epoch, self.epochs)
        # In whole 2**-32, so that no device rounds them its own way. The last is above every word:
        # C shares add up to 1 within C * 2**-53.
        limits = torch.from_numpy(np.rint(np.cumsum(share) * 2.0**32).astype(np.int64))
        limits, counts, by_class = (
            values.to(self.device) for values in (limits, self._counts, self._by_class)
        )
        draws = torch.arange(len(by_class), device=self.device)
        words = random_bits(self.seed, epoch, draws, SAMPLER, 2)
        classes = torch.bucketize(words[:, 0].contiguous(), limits, right=True)
        starts = counts.cumsum(0) - counts
        return by_class[starts[classes] + (words[:, 1] * counts[classes] >> 32)]


def class_probabilities(
    counts: npt.NDArray[np.int64], sampler: str, epoch: int = 0, epochs: int = 1
) -> npt.NDArray[np.float64]:
    """Return the share of each class among the images a sampler shows: [C], its sum 1.

    counts: images per class; a class without images gets none. class-balanced: equal shares.
    square-root: n^0.5. effective: n / (1 - beta^n), beta = (N - 1) / N, Cui et al., "Class-balanced
    loss based on effective number of samples" (CVPR 2019). progressive: from instance in the first
    epoch straight to class-balanced in the last, Kang et al., "Decoupling representation and
    classifier" (ICLR 2020).
    """
    present = (counts > 0).astype(np.float64)
    total = int(counts.sum())
    match sampler:
        case "instance":
            weights = counts.astype(np.float64)
        case "class-balanced":
            weights = present
        case "square-root":
            weights = np.sqrt(counts)
        case "effective":
            beta = (total - 1) / total
            weights = counts / np.where(counts > 0, 1 - beta**counts, 1.0)
        case _:
            progress = min(epoch / max(epochs - 1, 1), 1.0)
            weights = (1 - progress) * counts / total + progress * present / present.sum()
    return np.asarray(weights / weights.sum())


def _check(
    count: int, batch_size: int, sampler: str, drop_last: bool, rank: int, world: int
) -> None:
    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler!r} is unknown: use one of {', '.join(SAMPLERS)}")
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} of {world} processes: must lie in 0..{world - 1}")
    if count == 0:
        raise ValueError("there are no images to order: give a training set with some")
    if batch_size < world:
        raise ValueError(
            f"--batch-size {batch_size} is smaller than the number of processes that share it: "
            f"give at least {world}"
        )
    if drop_last and batch_size > count:
        raise ValueError(
            f"--batch-size {batch_size} with drop_last leaves nothing of {count} images: lower it"
        )

"""The whole set on the device as uint8: a batch is a vector of positions, and nothing is copied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from reat_fast.data import ImageSet
from reat_fast.loaders import Batch
from reat_fast.loaders.order import EpochOrder

SHARE = 0.5
"""Of the free memory, how much a set may take; the rest is for the network and its activations."""


class ResidentLoader:
    """Give batches of a set that lives on the device; images in files are decoded once.

    Raises ValueError where the set does not fit.
    """

    def __init__(self, image_set: ImageSet, order: EpochOrder, device: torch.device) -> None:
        lack = shortage(image_set, device)
        if lack:
            raise ValueError(f"--loader resident: {lack}; use --loader ffcv or --loader workers")
        self.images = torch.from_numpy(np.asarray(image_set.images)).to(device)
        self.labels = torch.from_numpy(image_set.labels).to(device)
        self.order = order.to(device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch, from batch `first` on."""
        shown = self.order.indices(epoch)
        labels = self.labels[shown]  # once an epoch: of a batch, that is a kernel to launch
        for rows, own in zip(
            self.order.split(shown, first), self.order.split(labels, first), strict=True
        ):
            yield Batch(self.images, own, rows, gather=True)

    def close(self) -> None:
        """Do nothing: the memory goes with the loader."""


def shortage(image_set: ImageSet, device: torch.device) -> str | None:
    """Say in a clause why a set does not fit on a device, or return None where it does."""
    images = image_set.images
    if device.type == "cpu" and isinstance(images, np.ndarray):
        return None  # it is there already, and is shared
    free = free_bytes(device)
    if free is None or images.nbytes <= SHARE * free:
        return None
    return (
        f"{len(images):,} images take {images.nbytes / 1e9:.1f} GB, more than half of the "
        f"{free / 1e9:.1f} GB that are free on {device}"
    )


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """Return the bytes that a device has free, or None where the system does not say.

    On Linux, what the memory limit of a container leaves counts too. root: where /proc and /sys
    are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    bounds = []
    memory = root / "proc/meminfo"
    if memory.exists():
        bounds.append(_field(memory, "MemAvailable:") * 1024)
    limit = root / "sys/fs/cgroup/memory.max"
    if limit.exists() and limit.read_text().strip() != "max":
        used = _field(limit.with_name("memory.stat"), "anon")  # all else can be reclaimed
        bounds.append(int(limit.read_text()) - used)
    return min(bounds, default=None)


def _field(table: Path, name: str) -> int:
    lines = (line.split() for line in table.read_text().splitlines())
    return next(int(line[1]) for line in lines if line[0] == name)

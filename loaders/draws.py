"""Random numbers for each draw, where a sampler draws an image several times in an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from reat_fast.loaders import Batch, Loader


class FreshDraws:
    """Give what another loader gives, with random numbers keyed by the draw and not by the image.

    Else all draws of a rare image in an epoch would have the same crop and the same random start,
    and drawing it often would be no more than weighing it. device: where the batches are.
    """

    def __init__(self, loader: Loader, device: torch.device) -> None:
        self._loader = loader
        self.order = loader.order
        # A copy would wait there for the step before.
        self._there = loader.order.to(device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch, from batch `first` on."""
        batches = self._loader.epoch(epoch, first)
        for batch, places in zip(batches, self._there.places(first), strict=True):
            images = batch.images[batch.indices] if batch.gather else batch.images
            yield Batch(images, batch.labels, places, gather=False)

    def close(self) -> None:
        """Close the loader."""
        self._loader.close()

"""Images with their labels, and the training and test set of a source, as arrays of bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reat_fast.sources.lazy import LazyImages
from reat_fast.sources.longtail import Indices

Images = npt.NDArray[np.uint8] | LazyImages


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Hold images, uint8 [N, H, W, C] with C 1 or 3, and labels, int64 [N].

    images: an array, or LazyImages, which decode what is indexed.
    Errors: ValueError for others.
    """

    images: Images
    labels: Indices

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        arrays = [isinstance(getattr(one, "dtype", None), np.dtype) for one in (images, labels)]
        if not all(arrays):
            given = f"{type(images).__name__} and {type(labels).__name__}"
            raise ValueError(f"images, labels: {given}; give numpy arrays")
        if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] not in (1, 3):
            given = f"{images.dtype} of shape {list(images.shape)}"
            raise ValueError(f"images: {given}; give uint8 [N, H, W, C], C 1 or 3")
        if labels.dtype != np.int64 or labels.shape != images.shape[:1]:
            given = f"{labels.dtype} of shape {list(labels.shape)}"
            raise ValueError(
                f"labels: {given}; give int64, a class for each of {len(images)} images"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> ImageSet:
        """Return a copy of the images and labels at `indices`; of lazy images, a view."""
        lazy = isinstance(self.images, LazyImages)
        images = self.images.take(indices) if lazy else self.images[indices]
        return ImageSet(images, self.labels[indices])

    def evenly(self, count: int) -> ImageSet:
        """Take at most `count` images, each class by its share, evenly spread, in their order.

        Whatever the order of the set is: sorted by class, mixed, or class after class in turn.
        """
        kept = min(count, len(self))
        by_class = np.argsort(self.labels, kind="stable")
        return self.take(np.sort(by_class[spread(kept, len(self))]))


def spread(count: int, length: int) -> Indices:
    """Return `count` places, evenly spread over so many."""
    return np.arange(count, dtype=np.int64) * length // max(count, 1)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold a checked data set; label c is the class `class_names[c]`, notes are for the user."""

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)

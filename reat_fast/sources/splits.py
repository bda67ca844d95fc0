"""What a run trains on, chooses its best epoch on and is tested on, drawn from a data set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from reat_fast.sources.formats import DataError
from reat_fast.sources.image_set import Dataset, ImageSet
from reat_fast.sources.longtail import (
    Indices,
    held_out_split,
    longtail_counts,
    longtail_indices,
)


@dataclass(frozen=True, eq=False)
class Splits:
    """Hold what a run trains on, chooses its best epoch on, and is tested on.

    counts: images per class of `train`, which the losses use. The indices point into the training
    images of the data set; the fingerprint is a sha256 over indices and labels, in order.
    """

    train: ImageSet
    held_out: ImageSet
    test: ImageSet
    counts: list[int]
    train_indices: Indices
    held_out_indices: Indices
    fingerprint: str


UNEVEN = 1.05
"""Own sizes of classes that differ by more than this factor are no accident."""
AS_IS = "--imbalance-profile as-is"


def make_splits(
    dataset: Dataset,
    *,
    imbalance: float,
    profile: str = "exp",
    largest: int | None = None,
    held_out: float = 0.05,
    seed: int = 0,
) -> Splits:
    """Draw the long-tailed training set and its held-out part; the test set stays as it is.

    profile: of longtail_counts, or "as-is" for a set that is long-tailed already: all its images,
    whatever the imbalance. largest: images of class 0 before holding out; by default the size of
    the smallest class, the official N / C of a balanced set. Raises DataError.
    """
    labels = dataset.train.labels
    if dataset.num_classes < 2:
        raise DataError(
            f"{dataset.name}: one class, {dataset.class_names[0]}, is nothing to tell apart; "
            "--data of images in folders names the folder that holds one of each class"
        )
    if profile == "as-is":
        if largest is not None:
            raise DataError("--largest: a set that is taken as-is has every image; leave it out")
        subset = np.arange(len(labels), dtype=np.int64)
    else:
        own = np.bincount(labels, minlength=dataset.num_classes)
        try:
            most = _smallest_class(labels, imbalance) if largest is None else largest
            drawn = longtail_counts(most, dataset.num_classes, imbalance, profile)
            subset = longtail_indices(labels, drawn, seed)
        except DataError as error:
            if own.max() <= UNEVEN * own.min() or AS_IS in str(error):
                raise
            raise DataError(
                f"{error}; its classes have {own.max():,} to {own.min():,} images themselves: "
                f"{AS_IS} takes them so"
            ) from None
    kept, apart = held_out_split(labels[subset], held_out, seed)
    train, held = subset[kept], subset[apart]
    digest = hashlib.sha256()
    for values in (np.array([len(train)]), train, labels[train], held, labels[held]):
        digest.update(values.astype("<i8").tobytes())
    counts = np.bincount(labels[train], minlength=dataset.num_classes).tolist()
    parts = (dataset.train.take(train), dataset.train.take(held), dataset.test)
    return Splits(*parts, counts, train, held, digest.hexdigest())


def _smallest_class(labels: Indices, imbalance: float) -> int:
    sizes = np.bincount(labels)
    if imbalance < 1 and sizes.min() <= imbalance * sizes.max():
        found = f"long-tailed already, {sizes.max()} to {sizes.min()} images a class"
        raise DataError(
            f"--imbalance {imbalance:g}: the training set is {found}; take it as it is "
            f"({AS_IS} in training, no --imbalance in convert), or give --largest"
        )
    return int(sizes.min())

"""Which images a long-tailed subset has, which of them are held out, and what its tail is.

Every draw uses numpy's legacy generator, whose stream is frozen: a seed means the same images on
any version of numpy, and the official subset is reproduced index by index.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reat_fast.sources.formats import DataError

Indices = npt.NDArray[np.int64]


def longtail_counts(
    largest: int, num_classes: int, imbalance: float, profile: str = "exp"
) -> list[int]:
    """Return the images per class of a long-tailed set, largest class first.

    imbalance: smallest / largest, in (0, 1]. profile: "exp" falls geometrically; "step" keeps the
    first C // 2 classes whole and cuts all others (the official code forgets the last class of an
    odd C). Official arithmetic, rounding down. Raises DataError.
    """
    if not 0 < imbalance <= 1:
        raise DataError(f"--imbalance {imbalance}: must lie in (0, 1], smallest over largest class")
    if largest < 1 or num_classes < 1:
        raise DataError(f"largest and num_classes must be positive, got {largest}, {num_classes}")
    if profile not in ("exp", "step"):
        raise DataError(f"profile must be exp or step, got {profile!r}")
    if profile == "exp":
        last = max(num_classes - 1.0, 1.0)
        counts = [int(largest * imbalance ** (c / last)) for c in range(num_classes)]
    else:
        whole = max(num_classes // 2, 1)
        counts = [largest] * whole + [int(largest * imbalance)] * (num_classes - whole)
    if 0 in counts:
        empty = f"--imbalance {imbalance}: leaves class {counts.index(0)} empty"
        raise DataError(f"{empty}; raise it above 1/{largest}, or give a larger --largest")
    return counts


def longtail_indices(labels: npt.ArrayLike, counts: Sequence[int], seed: int = 0) -> Indices:
    """Return the indices of the official subset: int64 [sum(counts)], class by class.

    One shuffle per class in class order, first counts[c] kept (IMBALANCECIFAR10 of the official
    code, itself from LDAM). Raises DataError where a class has fewer images than asked.
    """
    labels = np.asarray(labels)
    if labels.size and not np.array_equal(labels, np.floor(labels)):
        raise DataError("labels must be whole numbers: 0 is the first class")
    if labels.size and not 0 <= labels.min() <= labels.max() < len(counts):
        found = f"{labels.min()}..{labels.max()}"
        raise DataError(f"labels go {found}, counts has {len(counts)} classes")
    generator = _generator(seed)
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        if not 0 <= count <= len(members):
            cure = "lower --largest"
            raise DataError(f"class {label} has {len(members)} images, {count} asked: {cure}")
        generator.shuffle(members)
        chosen.append(members[:count])
    return np.concatenate(chosen).astype(np.int64)


def held_out_split(
    labels: npt.ArrayLike, fraction: float = 0.05, seed: int = 0
) -> tuple[Indices, Indices]:
    """Split positions 0..N-1 into those trained on and those held out to choose the best epoch.

    labels: [N], of the subset. Each class gives round(fraction * n), at least 1 and never its last
    image; fraction 0 holds nothing out. Both results ascend. Raises DataError.
    """
    if not 0 <= fraction < 1:
        raise DataError(f"held_out must be a fraction in [0, 1), got {fraction}")
    labels = np.asarray(labels)
    held = np.zeros(len(labels), bool)
    generator = _generator(seed, 1)  # 1: a stream apart from the subset's
    for label in np.unique(labels) if fraction else ():
        members = generator.permutation(np.flatnonzero(labels == label))
        held[members[: min(max(1, round(fraction * len(members))), len(members) - 1)]] = True
    return np.flatnonzero(~held).astype(np.int64), np.flatnonzero(held).astype(np.int64)


def by_falling_size(counts: Sequence[int]) -> list[int]:
    """Return the classes from the largest to the smallest, equal ones as they come."""
    return sorted(range(len(counts)), key=lambda c: -counts[c])


def head_body_tail(num_classes: int, counts: Sequence[int] | None = None) -> dict[str, list[int]]:
    """Return the classes of head, body and tail, which together are all classes, by falling size.

    counts: training images per class; without them class 0 is taken for the largest, as it is in
    every subset drawn here. tail: range(C // 3 * 2 + 1, C) as in the official code, or the last
    class where that is empty (C 1 and 3); head: the first C // 3 (at least one, if any is left);
    body: those between.
    """
    tail = min(num_classes // 3 * 2 + 1, num_classes - 1)
    head = min(max(num_classes // 3, 1), tail)
    classes = list(range(num_classes)) if counts is None else by_falling_size(counts)
    return {"head": classes[:head], "body": classes[head:tail], "tail": classes[tail:]}


def _generator(*seed: int) -> np.random.RandomState:
    if not 0 <= seed[0] < 2**32:
        raise DataError(f"seed must be in 0..2**32 - 1, got {seed[0]}")
    return np.random.RandomState(seed[0] if len(seed) == 1 else list(seed))

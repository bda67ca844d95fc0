"""Data sets as arrays of bytes, and the long-tailed splits drawn from them.

    python -m reat_fast.data --list            what there is, and where
    python -m reat_fast.data fashion-mnist     download it into the cache folder

Every draw uses numpy's legacy generator, whose stream is frozen: a seed means the same images on
any version of numpy, and the official subset is reproduced index by index.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from reat_fast import download, sources
from reat_fast.sources import Array
from reat_fast.sources import DataError as DataError

Indices = npt.NDArray[np.int64]

DATASETS: dict[str, tuple[str, ...]] = {**download.CLASS_NAMES, "npz": (), "folder": ()}
"""Names that `load_dataset` knows, each with its class names where these are fixed."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Hold images, uint8 [N, H, W, C] with C 1 or 3, and labels, int64 [N]."""

    images: npt.NDArray[np.uint8]
    labels: Indices

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Indices) -> ImageSet:
        """Return a copy of the images and labels at `indices`."""
        return ImageSet(self.images[indices], self.labels[indices])


@dataclass(frozen=True, eq=False)
class Dataset:
    """Hold a checked data set; label c is the class `class_names[c]`."""

    name: str
    train: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """Return the number of classes."""
        return len(self.class_names)


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


def load_dataset(name: str, path: Path | None = None) -> Dataset:
    """Load and check a data set.

    name: one of DATASETS. path: an .npz file (read as the named set), an image folder for "folder",
    or where a named set lies, by default in `download.search_folders(name)`. Raises DataError.
    """
    if name not in DATASETS:
        raise DataError(f"dataset {name!r} is unknown: use one of {', '.join(DATASETS)}")
    if path is not None and not path.exists():
        raise DataError(f"--data {path}: no such file or folder")
    if path is not None and path.suffix == ".npz":
        return _checked(name, sources.read_npz(path))
    if path is not None and name == "folder":
        return _checked(name, sources.read_image_folder(path))
    if name in ("npz", "folder"):
        what = "FILE.npz" if name == "npz" else "FOLDER of train/CLASS/*.png and test/CLASS/*.png"
        raise DataError(f"dataset {name} needs --data {what}, got {path}")
    folders = download.search_folders(name) if path is None else [path]
    found = download.find(name, folders)
    if found is None:
        where = ", ".join(map(str, folders))
        cure = f"fetch it with `python -m reat_fast.data {name}`, or give --data PATH"
        raise DataError(f"{name} not found in {where} ({download.FILES[name]}): {cure}")
    return _checked(name, download.read(name, found))


def _checked(name: str, source: sources.Source) -> Dataset:
    """Check everything a file can get wrong; what passes is safe to index and count."""
    x_train, y_train, x_test, y_test = source.arrays
    train = _image_set(x_train, y_train, *source.names[:2])
    test = _image_set(x_test, y_test, *source.names[2:])
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = f"{test.images.shape[1:]}, those for training {train.images.shape[1:]}"
        raise DataError(f"{source.names[2]}: test images are {shapes}; make them equal")
    present, class_names = np.unique(train.labels), source.class_names
    num_classes = len(class_names) if class_names else int(present[-1]) + 1
    for labels, labels_name in ((train.labels, source.names[1]), (test.labels, source.names[3])):
        if not 0 <= labels.min() <= labels.max() < num_classes:
            found = f"got {labels.min()}..{labels.max()}"
            raise DataError(f"{labels_name}: labels must be in 0..{num_classes - 1}, {found}")
    if len(present) < num_classes:
        empty = int(np.setdiff1d(np.arange(len(present) + 1), present)[0])
        title = f" ({class_names[empty]})" if class_names else ""
        raise DataError(f"{source.names[1]}: class {empty}{title} has no image; add some")
    if class_names is None:
        fits = len(DATASETS[name]) == num_classes
        class_names = DATASETS[name] if fits else tuple(map(str, range(num_classes)))
    return Dataset(name, train, test, class_names)


def _image_set(images: Array, labels: Array, images_name: str, labels_name: str) -> ImageSet:
    if images.dtype != np.uint8:
        raise DataError(f"{images_name}: images must be uint8 0..255, got {_content(images)}")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        wanted = "[N, H, W, C], none of them 0, C 1 or 3"
        raise DataError(f"{images_name}: images must be {wanted}, got {_content(images)}")
    if labels.dtype.kind not in "iu":
        raise DataError(f"{labels_name}: labels must be integers, got {_content(labels)}")
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels  # as Keras writes them
    if labels.shape != images.shape[:1]:
        raise DataError(f"{labels_name}: {_content(labels)} for {len(images)} images")
    # torch shares memory with writable arrays only; archives give read-only views of their bytes.
    return ImageSet(np.require(images, requirements=["C", "W"]), labels.astype(np.int64))


def _content(array: Array) -> str:
    nan = " with NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
    return f"{array.dtype} {list(array.shape)}{nan}"


def longtail_counts(
    largest: int, num_classes: int, imbalance: float, profile: str = "exp"
) -> list[int]:
    """Return the images per class of a long-tailed set, largest class first.

    imbalance: smallest / largest, in (0, 1]. profile: "exp" falls geometrically; "step" keeps the
    first C // 2 classes whole and cuts all others (the official code forgets the last class of an
    odd C). Official arithmetic, rounding down. Raises DataError.
    """
    if not 0 < imbalance <= 1:
        raise DataError(f"imbalance must be in (0, 1], smallest / largest class, got {imbalance}")
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
        empty = f"imbalance {imbalance} leaves class {counts.index(0)} empty"
        raise DataError(f"{empty}: raise it above 1/{largest}, or use a larger largest")
    return counts


def longtail_indices(labels: npt.ArrayLike, counts: Sequence[int], seed: int = 0) -> Indices:
    """Return the indices of the official subset: int64 [sum(counts)], class by class.

    One shuffle per class in class order, first counts[c] kept (IMBALANCECIFAR10 of the official
    code, itself from LDAM). Raises DataError where a class has fewer images than asked.
    """
    labels = np.asarray(labels)
    if labels.size and not 0 <= labels.min() <= labels.max() < len(counts):
        raise DataError(
            f"labels go {labels.min()}..{labels.max()}, counts has {len(counts)} classes"
        )
    generator = _generator(seed)
    chosen = []
    for label, count in enumerate(counts):
        members = np.flatnonzero(labels == label)
        if not 0 <= count <= len(members):
            cure = "lower the largest class (largest)"
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

    largest: images of class 0 before holding out; by default the size of the smallest class, the
    official N / C of a balanced set. Raises DataError.
    """
    labels = dataset.train.labels
    largest = int(np.bincount(labels).min()) if largest is None else largest
    drawn = longtail_counts(largest, dataset.num_classes, imbalance, profile)
    subset = longtail_indices(labels, drawn, seed)
    kept, apart = held_out_split(labels[subset], held_out, seed)
    train, held = subset[kept], subset[apart]
    digest = hashlib.sha256()
    for values in (np.array([len(train)]), train, labels[train], held, labels[held]):
        digest.update(values.astype("<i8").tobytes())
    counts = np.bincount(labels[train], minlength=dataset.num_classes).tolist()
    parts = (dataset.train.take(train), dataset.train.take(held), dataset.test)
    return Splits(*parts, counts, train, held, digest.hexdigest())


def head_body_tail(num_classes: int) -> dict[str, list[int]]:
    """Return the classes of head, body and tail, which together are all classes, in order.

    tail: range(C // 3 * 2 + 1, C) as in the official code, or the last class where that is empty
    (C 1 and 3); head: the first C // 3 (at least one, if any is left); body: those between.
    """
    tail = min(num_classes // 3 * 2 + 1, num_classes - 1)
    head = min(max(num_classes // 3, 1), tail)
    classes = list(range(num_classes))
    return {"head": classes[:head], "body": classes[head:tail], "tail": classes[tail:]}


def _generator(*seed: int) -> np.random.RandomState:
    if not 0 <= seed[0] < 2**32:
        raise DataError(f"seed must be in 0..2**32 - 1, got {seed[0]}")
    return np.random.RandomState(seed[0] if len(seed) == 1 else list(seed))


def main(arguments: Sequence[str] | None = None) -> None:
    """Download a data set, or list all; exit with code 2 and one line on failure."""
    parser = argparse.ArgumentParser(prog="python -m reat_fast.data", description=main.__doc__)
    parser.add_argument("name", nargs="?", help=", ".join(download.CLASS_NAMES))
    parser.add_argument("--list", action="store_true", help="say what there is, and where")
    parser.add_argument("--to", type=Path, metavar="DIR", help="instead of the cache folder")
    options = parser.parse_args(arguments)
    try:
        if not options.list and options.name not in download.CLASS_NAMES:
            raise DataError(
                f"NAME must be one of {', '.join(download.CLASS_NAMES)}; or give --list"
            )
        for name in DATASETS if options.list else [options.name]:
            print(_describe(name) if options.list else _obtain(name, options.to))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _describe(name: str) -> str:
    if name not in download.CLASS_NAMES:
        return f"{name:14} your own images: --dataset {name} --data PATH"
    place = download.find(name, download.search_folders(name))
    return f"{name:14} {len(DATASETS[name])} classes: {place or 'not here; NAME downloads it'}"


def _obtain(name: str, to: Path | None) -> str:
    place = download.find(name, download.search_folders(name) if to is None else [to])
    verb = "already there" if place else "downloaded"
    place = place or download.fetch_dataset(name, to or download.cache_folder())
    dataset = load_dataset(name, place)
    sizes = f"{len(dataset.train)} training and {len(dataset.test)} test images"
    return f"{name} {verb}: {place} ({sizes}, {dataset.num_classes} classes)"


if __name__ == "__main__":
    main()

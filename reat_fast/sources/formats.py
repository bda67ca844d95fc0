"""Readers of IDX and .npz files, and the check that every set has to pass.

Files come from strangers: whatever damaged bytes make a parser raise reaches the user as one
DataError that names the file.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reat_fast.cli.terminal import one_line

Array = npt.NDArray[Any]
PARTS = ("training images", "training labels", "test images", "test labels")


class DataError(ValueError):
    """Tell the user in one line which file or argument is wrong, and the cure."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # files name what they hold as they like


class Source(NamedTuple):
    """What a reader found, unchecked: x_train, y_train, x_test, y_test and what to call each.

    The images may be lazy, see reat_fast.sources.lazy. notes: lines to tell the user.
    """

    arrays: list[Any]
    names: list[str]
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()


@contextmanager
def reading(path: Path, cure: str = "remove it and fetch it again") -> Iterator[None]:
    """Turn whatever a parser raises on `path` into one DataError."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: not found; {cure}") from error
    except Exception as error:  # a parser of damaged bytes raises nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path}: cannot be read ({reason}); {cure}") from error


IDX_FILES = tuple(
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
)


def find_idx(root: Path) -> Path | None:
    """Return the folder at or under `root` that holds Fashion-MNIST's IDX files, or None."""
    folders = (root, root / "fashion-mnist", root / "FashionMNIST" / "raw")
    whole = [at for at in folders if all(_idx_path(at, name).is_file() for name in IDX_FILES)]
    return whole[0] if whole else None


def read_idx_folder(folder: Path) -> Source:
    """Read the four IDX files, .gz or plain, of a folder; raises DataError."""
    paths = [_idx_path(folder, name) for name in IDX_FILES]
    return Source([read_idx(path) for path in paths], [str(path) for path in paths])


def read_idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read one IDX file of unsigned bytes, shaped as its header says; raises DataError."""
    with reading(path):
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
    rank = content[3] if len(content) > 3 else 0
    if content[:3] != b"\0\0\x08" or not 1 <= rank <= 3:
        raise DataError(f"{path}: not an IDX file of bytes; fetch it again")
    start = 4 + 4 * rank
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4)]
    expected = start + math.prod(shape)
    if len(content) != expected:
        what = "truncated" if len(content) < expected else "too long"
        raise DataError(f"{path}: {what}, {len(content)} bytes of {expected}; fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _idx_path(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.is_file() else folder / f"{name}.gz"


_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> Source:
    """Read x_train, y_train, x_test, y_test and, if present, the strings class_names.

    Raises DataError; object arrays are refused, since reading one runs a pickle.
    """
    cure = f"write it with numpy.savez and {', '.join(_NPZ_KEYS)}, arrays of numbers"
    with reading(path, cure), np.load(path, allow_pickle=False) as archive:
        missing = [key for key in _NPZ_KEYS if key not in archive.files]
        if missing:
            found = ", ".join(archive.files) or "nothing"
            raise DataError(f"{path}: no array {', '.join(missing)} (found: {found}); {cure}")
        arrays = [archive[key] for key in _NPZ_KEYS]
        cure = "write class_names as numpy.array(names, str)"
        with reading(path, cure):
            listed = archive["class_names"].ravel() if "class_names" in archive.files else None
    class_names = None if listed is None else tuple(str(name) for name in listed)
    return Source(arrays, [f"{path}: {key}" for key in _NPZ_KEYS], class_names)


def checked(source: Source, usual_names: tuple[str, ...] = ()) -> Source:
    """Check everything a file can get wrong; what passes is safe to index and count.

    Images become uint8 [N, H, W, C], labels int64 [N]; usual_names, if there is one per class,
    stand in for class names that the source lacks, else numbers do. Raises DataError.
    """
    x_train, y_train, x_test, y_test = source.arrays
    x_train, y_train = _checked_pair(x_train, y_train, *source.names[:2])
    x_test, y_test = _checked_pair(x_test, y_test, *source.names[2:])
    if x_train.shape[1:] != x_test.shape[1:]:
        shapes = f"{x_test.shape[1:]}, those for training {x_train.shape[1:]}"
        raise DataError(f"{source.names[2]}: test images are {shapes}; make them equal")
    present, class_names = np.unique(y_train), source.class_names
    num_classes = len(class_names) if class_names else int(present[-1]) + 1
    for labels, labels_name in ((y_train, source.names[1]), (y_test, source.names[3])):
        if not 0 <= labels.min() <= labels.max() < num_classes:
            found = f"labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}"
            named = f"; class_names has {num_classes} names" if class_names else ""
            raise DataError(f"{labels_name}: {found}{named}")
    if len(present) < num_classes:
        if class_names is None and 1 == present[0] == num_classes - len(present):
            raise DataError(
                f"{source.names[1]}: labels run from 1 to {present[-1]}, the first class is 0; "
                "take 1 off all, those of the test too"
            )
        empty = int(np.setdiff1d(np.arange(len(present) + 1), present)[0])
        title = f" ({class_names[empty]})" if class_names else ""
        raise DataError(
            f"{source.names[1]}: class {empty}{title} has no image; add some, or number "
            "the classes without it"
        )
    if class_names is None:
        fits = len(usual_names) == num_classes
        class_names = usual_names if fits else tuple(map(str, range(num_classes)))
    return source._replace(arrays=[x_train, y_train, x_test, y_test], class_names=class_names)


def _checked_pair(
    images: Any, labels: Array, images_name: str, labels_name: str
) -> tuple[Any, npt.NDArray[np.int64]]:
    if images.dtype != np.uint8:
        found = f"images must be uint8 0..255, got {_content(images)}"
        raise DataError(f"{images_name}: {found}{_way_to_bytes(images)}")
    images = images[..., None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        found = f"images must be [N, H, W, C], none of them 0, C 1 or 3, got {_content(images)}"
        first = images.ndim == 4 and images.shape[1] in (1, 3)
        cure = "; transpose(0, 2, 3, 1) puts the channels last" if first else ""
        raise DataError(f"{images_name}: {found}{cure}")
    if labels.ndim == 2 and labels.shape[1] > 1:
        found = f"one label an image, got {_content(labels)}"
        raise DataError(f"{labels_name}: {found}; argmax(1) makes labels of one-hot rows")
    if labels.dtype.kind not in "iu":
        found = f"labels must be integers, got {_content(labels)}"
        raise DataError(f"{labels_name}: {found}{_way_to_labels(labels)}")
    labels = labels[:, 0] if labels.shape[1:] == (1,) else labels  # as Keras writes them
    if labels.shape != images.shape[:1]:
        found = f"{_content(labels)} for {len(images)} images"
        raise DataError(f"{labels_name}: {found}; give one an image")
    if isinstance(images, np.ndarray):
        # torch shares memory with writable arrays only; archives give read-only views.
        images = np.require(images, requirements=["C", "W"])
    return images, labels.astype(np.int64)


def _way_to_bytes(images: Array) -> str:
    if images.dtype.kind not in "bfiu" or not images.size:
        return ""
    low, high = float(images.min()), float(images.max())  # NaN is in no range
    if images.dtype.kind in "bf" and 0 <= low <= high <= 1:
        return "; (255 * images).round().astype(numpy.uint8) makes them so"
    if 0 <= low <= high <= 255:
        return "; astype(numpy.uint8) makes them so"
    known = low <= high
    return f" from {low:.3g} to {high:.3g}; undo what was done to them" if known else ""


def _way_to_labels(labels: Array) -> str:
    if labels.dtype.kind == "U":
        return "; number the classes from 0 and give their names in that order as class_names"
    if labels.dtype.kind == "b" or (
        labels.dtype.kind == "f" and np.all(labels == np.floor(labels))
    ):
        return "; astype(numpy.int64) makes them so"
    return "; number the classes from 0"


def _content(array: Any) -> str:
    nan = " with NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
    return f"{array.dtype} {list(array.shape)}{nan}"

"""Readers of the binary formats, IDX, CIFAR and .npz, and the check that every set has to pass.

Files come from strangers: archives are read by member name and never extracted, pickles are
recorded and never run, and whatever damaged bytes make a parser raise reaches the user as one
DataError that names the file.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
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


class _Cifar(NamedTuple):
    places: str
    batches: str  # training, then test
    key: str
    label_bytes: int  # of a binary record; CIFAR-100 has the coarse label first, then the fine one


_CIFAR = {
    10: _Cifar(
        "cifar-10-batches-py cifar-10-python.tar.gz cifar-10-batches-bin cifar-10-binary.tar.gz",
        "data_batch_1 data_batch_2 data_batch_3 data_batch_4 data_batch_5 test_batch",
        "labels",
        1,
    ),
    100: _Cifar(
        "cifar-100-python cifar-100-python.tar.gz cifar-100-binary cifar-100-binary.tar.gz",
        "train test",
        "fine_labels",
        2,
    ),
}


def find_cifar(root: Path, num_classes: int) -> Path | None:
    """Return the archive or unpacked folder of CIFAR-10 or -100 at or under `root`, or None."""
    test = _CIFAR[num_classes].batches.split()[-1]
    if root.is_file() or any((root / name).is_file() for name in (test, f"{test}.bin")):
        return root
    places = [root / place for place in _CIFAR[num_classes].places.split()]
    return next((place for place in places if place.exists()), None)


def read_cifar(path: Path, num_classes: int) -> Source:
    """Read CIFAR-10 or -100, python or binary version, a .tar.gz or the unpacked folder.

    Images are uint8 [N, 32, 32, 3], labels the fine ones; raises DataError.
    """
    _, listed, key, label_bytes = _CIFAR[num_classes]
    batches = listed.split()
    members = _read_members(path, {f"{batch}{end}" for batch in batches for end in ("", ".bin")})
    read: list[tuple[Array, Array]] = []
    for batch in batches:
        if batch in members:
            read.append(_python_batch(members[batch], path / batch, key))
        elif f"{batch}.bin" in members:
            read.append(_binary_batch(members[f"{batch}.bin"], path / batch, label_bytes))
        else:
            found = ", ".join(sorted(members)) or "nothing of CIFAR"
            raise DataError(f"{path}: {batch} is missing (found: {found}); fetch it again")
    with reading(path):
        images, labels = (np.concatenate(arrays) for arrays in zip(*read[:-1], strict=True))
    return Source([images, labels, *read[-1]], [f"{path} ({part})" for part in PARTS])


def _read_members(path: Path, wanted: set[str]) -> dict[str, bytes]:
    with reading(path):
        if path.is_dir():
            return {name: (path / name).read_bytes() for name in wanted if (path / name).is_file()}
        contents = {}
        with tarfile.open(path) as archive:
            for member in archive:  # in order, once: seeking back in a .gz unpacks it again
                name = PurePosixPath(member.name).name
                if member.isfile() and name in wanted and (stream := archive.extractfile(member)):
                    contents[name] = stream.read()
            while archive.fileobj and archive.fileobj.read(1 << 20):
                pass  # gzip looks at its checksum at the very end, where tar need not go
        return contents


def _binary_batch(content: bytes, path: Path, label_bytes: int) -> tuple[Array, Array]:
    size = label_bytes + 3072
    if not content or len(content) % size:
        raise DataError(f"{path}.bin: truncated, {len(content)} bytes are no multiple of {size}")
    records = np.frombuffer(content, np.uint8).reshape(-1, size)
    return _as_nhwc(records[:, label_bytes:]), records[:, label_bytes - 1]


def _python_batch(content: bytes, path: Path, key: str) -> tuple[Array, Array]:
    with reading(path):
        batch = _RecordingUnpickler(io.BytesIO(content), encoding="latin1").load()
        if not isinstance(batch, dict) or not {"data", key} <= batch.keys():
            raise DataError(f"{path}: no CIFAR batch of 'data' and {key!r}; fetch it again")
        rows, labels = _as_array(batch["data"]), _as_array(batch[key])
        if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] != 3072:
            raise DataError(f"{path}: data is {rows.dtype} {rows.shape}, not uint8 [N, 3072]")
        if labels.shape != rows.shape[:1]:
            raise DataError(f"{path}: {len(rows)} images, but {key} of shape {labels.shape}")
        return _as_nhwc(rows), labels


def _as_nhwc(rows: Array) -> Array:
    return np.ascontiguousarray(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


class _Recorded:
    """What a pickle asks to build, written down and not built."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RecordingUnpickler(pickle._Unpickler):
    """Calls nothing a pickle names, not even numpy, whose state setters a hostile one can crash.

    In Python because the C one allocates as much memory as a damaged memo index asks for.
    """

    def find_class(self, module: str, name: str) -> type[_Recorded]:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return _Recorded
            case ("numpy", "ndarray" | "dtype") | ("_codecs", "encode"):  # encode: Python 3's bytes
                return _Recorded
        raise ValueError(f"refused: its pickle asks for {module}.{name}")


def _as_array(value: Any) -> Array:
    """Return the recorded array of bytes, or the list of numbers, as an array."""
    if not isinstance(value, _Recorded):
        return np.asarray(value)
    _, shape, dtype, fortran, content = value.state
    if dtype.arguments[0] != "u1":
        raise ValueError(f"an array is of {dtype.arguments[0]}, not of bytes")
    if isinstance(content, _Recorded):
        content = content.arguments[0]
    if isinstance(content, str):
        content = content.encode("latin1")
    flat: Array = np.frombuffer(content, np.uint8)
    return flat.reshape(tuple(shape), order="F" if fortran else "C")


_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


def read_npz(path: Path) -> Source:
    """Read x_train, y_train, x_test, y_test and, if present, the strings class_names.

    Raises DataError; object arrays are refused, since reading one runs a pickle.
    """
    cure = "write it again with numpy.savez and arrays of numbers"
    with reading(path, cure), np.load(path, allow_pickle=False) as archive:
        missing = [key for key in _NPZ_KEYS if key not in archive.files]
        if missing:
            found = ", ".join(archive.files) or "nothing"
            raise DataError(f"{path}: no array {', '.join(missing)} (found: {found}); {cure}")
        arrays = [archive[key] for key in _NPZ_KEYS]
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
            found = f"got {labels.min()}..{labels.max()}"
            raise DataError(f"{labels_name}: labels must be in 0..{num_classes - 1}, {found}")
    if len(present) < num_classes:
        empty = int(np.setdiff1d(np.arange(len(present) + 1), present)[0])
        title = f" ({class_names[empty]})" if class_names else ""
        raise DataError(f"{source.names[1]}: class {empty}{title} has no image; add some")
    if class_names is None:
        fits = len(usual_names) == num_classes
        class_names = usual_names if fits else tuple(map(str, range(num_classes)))
    return source._replace(arrays=[x_train, y_train, x_test, y_test], class_names=class_names)


def _checked_pair(
    images: Any, labels: Array, images_name: str, labels_name: str
) -> tuple[Any, npt.NDArray[np.int64]]:
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
    if isinstance(images, np.ndarray):
        # torch shares memory with writable arrays only; archives give read-only views.
        images = np.require(images, requirements=["C", "W"])
    return images, labels.astype(np.int64)


def _content(array: Any) -> str:
    nan = " with NaN" if array.dtype.kind == "f" and np.isnan(array).any() else ""
    return f"{array.dtype} {list(array.shape)}{nan}"

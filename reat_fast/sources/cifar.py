"""Readers of CIFAR-10 and -100, python and binary version, packed or not.

Files come from strangers: archives are read by member name and never extracted, and pickles are
recorded and never run.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from reat_fast.sources.formats import PARTS, Array, DataError, Source, reading


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
        if isinstance(batch, dict):  # read as bytes and saved again, its keys are bytes
            batch = {_text(name): value for name, value in batch.items()}
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
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct" | "scalar":
                return _Recorded
            case "numpy.core.numeric" | "numpy._core.numeric", "_frombuffer":
                return _Recorded
            case ("numpy", "ndarray" | "dtype") | ("_codecs", "encode"):  # encode: Python 3's bytes
                return _Recorded
        raise ValueError(f"refused: its pickle asks for {module}.{name}")


def _as_array(value: Any) -> Array:
    """Return a recorded array of integers, or a list of numbers, as an array."""
    if isinstance(value, list):
        return np.asarray([_number(one) for one in value])
    if not isinstance(value, _Recorded):
        return np.asarray(value)
    if len(value.arguments) == 4:  # as protocol 5 has it
        content, dtype, shape, order = value.arguments
        fortran = order == "F"
    else:
        _, shape, dtype, fortran, content = value.state
    flat: Array = np.frombuffer(_bytes(content), _integers(dtype))
    return flat.reshape(tuple(shape), order="F" if fortran else "C")


def _number(value: Any) -> Any:
    """Return a number, that of numpy's own integers, too."""
    if not isinstance(value, _Recorded):
        return value
    dtype, content = value.arguments
    (number,) = np.frombuffer(_bytes(content), _integers(dtype)).tolist()
    return number


def _integers(dtype: _Recorded) -> np.dtype[np.integer[Any]]:
    kind, order = dtype.arguments[0], dtype.state[1]
    if kind not in ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8") or order not in "|<>=":
        raise ValueError(f"an array is of {kind}, not of integers")
    found: np.dtype[np.integer[Any]] = np.dtype(kind).newbyteorder(order)
    return found


def _bytes(content: Any) -> bytes:
    """Return bytes, which a pickle of Python 3 in the manner of 2 asks to encode."""
    if isinstance(content, _Recorded):
        content = content.arguments[0]
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(content, (bytes, bytearray)):  # a number would be taken for so many zeros
        raise ValueError(f"refused: its pickle has {type(content).__name__} for bytes")
    return bytes(content)


def _text(name: Any) -> Any:
    is_text = isinstance(name, (bytes, _Recorded))
    return _bytes(name).decode("latin1") if is_text else name

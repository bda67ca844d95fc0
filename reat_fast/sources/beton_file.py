"""Read FFCV's .beton files with numpy alone, and check everything that a file can get wrong.

A file is a header, one descriptor per field, a table of one record per image (which holds labels
and the places of the pixels), the pixels in pages of equal size, and a table of those places with
their sizes. FFCV trusts all of it and copies what it is told to where it is told, so a file passes
through here before FFCV sees it. Layout: version 2 of the format, ffcv/types.py of FFCV 1.0.2.

Pixels are read, not memory-mapped: where a mapped file shrinks, the process dies without a word.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from reat_fast.sources.formats import Array, DataError
from reat_fast.sources.lazy import Bytes, LazyImages, Rows

VERSION = 2
_HEADER = np.dtype(
    [("version", "<u2"), ("fields", "<u2"), ("page", "<u4"), ("images", "<u8"), ("table", "<u8")]
)
_FIELD = np.dtype([("type", "u1"), ("name", "u1", 16), ("arguments", "u1", 1024)])
_PLACE = np.dtype([("image", "<u8"), ("at", "<u8"), ("size", "<u8")])
_INT, _RGB, _ARRAY = 1, 2, 4
_RGB_RECORD = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("at", "<u8")])
# float, int, RGB image, bytes, array, JSON, tensor: FFCV's numbers of the fields are positions here
_RECORDS = ("<f8", "<i8", _RGB_RECORD, "<u8,<u8", "<u8", "<u8,<u8", "<u8")
_JPEG, _RAW = 0, 1
_ARRAY_OF_BYTES = b'[["", "|u1"]]'  # how FFCV writes the dtype uint8


class BetonError(DataError):
    """Tell in one line what is wrong with a .beton file, and the cure."""


@dataclass(frozen=True, eq=False)
class BetonFile:
    """Hold what a checked .beton file contains.

    labels: int64 [N]. fields: the names of all fields, image_field: of the one that was read.
    """

    path: Path
    images: BetonImages
    labels: npt.NDArray[np.int64]
    fields: tuple[str, ...]
    image_field: str


class BetonImages(LazyImages):
    """Decode the images of a .beton file, uint8 [N, H, W, C], or those at `rows` of it.

    rows: int64 [N], positions in the file. Needs pillow where images are JPEG; raises BetonError
    for one that is damaged.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], places: Array, rows: Rows) -> None:
        super().__init__((len(rows), *shape))
        self.path = path
        self.rows = rows
        self._places = places  # of all images of the file, in order: at, size, jpeg

    def read(self, indices: Rows) -> Bytes:
        """Decode the images at `indices`."""
        with _reading(self.path), self.path.open("rb", buffering=0) as file:
            images = np.empty((len(indices), *self.shape[1:]), np.uint8)
            for image, row in zip(images, self.rows[indices], strict=True):
                at, size, jpeg = self._places[row].tolist()
                file.seek(at)
                content = file.read(size)
                if len(content) < size:
                    _refuse(self.path, f"ends before image {row}")
                if jpeg:
                    image[:] = self._decode(content, row)
                else:
                    image[:] = np.frombuffer(content, np.uint8).reshape(image.shape)
        return images

    def take(self, indices: npt.ArrayLike) -> BetonImages:
        """Return the images at `indices`."""
        rows = self.rows[self._rows(indices)]
        return BetonImages(self.path, self.shape[1:], self._places, rows)

    def _decode(self, content: bytes, row: int) -> Bytes:
        try:
            from PIL import Image
        except ModuleNotFoundError as error:
            raise BetonError(
                f'{self.path}: JPEG images need pillow: pip install "reat-fast[images]"'
            ) from error
        height, width = self.shape[1:3]
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG",)) as image:
                if image.size != (width, height):
                    found = "x".join(map(str, image.size))
                    raise ValueError(f"it is {found}, not {width}x{height}")
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # a decoder of damaged bytes raises nearly anything
            _refuse(self.path, f"image {row} is damaged ({error})")


def read_beton(path: Path) -> BetonFile:
    """Read and check the tables of a .beton file; the pixels stay in it.

    One image field (RGB, or arrays of uint8 [H, W], [H, W, 1] or [H, W, 3]) and one integer field
    are used, those named "image" and "label" where there are several; other kinds are passed over.
    Raises BetonError.
    """
    with _reading(path):
        return _read_tables(path, path.stat().st_size)


def _read_tables(path: Path, size: int) -> BetonFile:
    def read(kind: np.dtype[Any], at: int, count: int) -> Array:
        if at + count * kind.itemsize > size:  # a damaged count may be any number
            _refuse(path, "is shorter than its header announces")
        return np.fromfile(path, kind, count, offset=at)

    header = read(_HEADER, 0, 1)[0]
    if header["version"] != VERSION:
        _refuse(path, f"is no .beton file of version {VERSION}")
    fields = read(_FIELD, _HEADER.itemsize, int(header["fields"]))
    kinds = fields["type"].tolist()
    if not kinds or max(kinds) >= len(_RECORDS):
        _refuse(path, "has no fields, or fields that FFCV alone cannot read")
    record = np.dtype([("", _RECORDS[kind]) for kind in kinds], align=True)
    records_at, table_at = _HEADER.itemsize + fields.nbytes, int(header["table"])
    records = read(record, records_at, int(header["images"]))
    pixels_at = records_at + records.nbytes
    if not pixels_at <= table_at <= size or (size - table_at) % _PLACE.itemsize:
        _refuse(path, "is not whole: its writer was interrupted, or its end is missing")
    if not records.size:
        _refuse(path, "holds no images")
    places = read(_PLACE, table_at, (size - table_at) // _PLACE.itemsize)
    _check_places(path, places, pixels_at, table_at, int(header["page"]))

    names = [_name(path, field) for field in fields]
    image = _choose(path, "image", names, [kind in (_RGB, _ARRAY) for kind in kinds])
    label = _choose(path, "label", names, [kind == _INT for kind in kinds])
    shape, found = _locate(path, fields[image], records[f"f{image}"], places)
    images = BetonImages(path, shape, found, np.arange(len(records), dtype=np.int64))
    labels = records[f"f{label}"].astype(np.int64)
    return BetonFile(path, images, labels, tuple(names), names[image])


def _locate(
    path: Path, field: Any, records: Array, places: Array
) -> tuple[tuple[int, int, int], Array]:
    """Return the shape of the images and where each lies: at, size, jpeg."""
    found = np.empty(len(records), [("at", "<i8"), ("size", "<i8"), ("jpeg", "?")])
    if field["type"] == _RGB:
        shape = _rgb_shape(path, records)
        found["at"], found["jpeg"] = records["at"], records["mode"] == _JPEG
    else:
        shape = _array_shape(path, field["arguments"])
        found["at"], found["jpeg"] = records, False
    places = places[np.argsort(places["at"], kind="stable")]
    if (np.diff(places["at"]) == 0).any():  # FFCV would take either size
        _refuse(path, "keeps two things in one place")
    nearest = np.searchsorted(places["at"], found["at"].view(np.uint64))
    lost = nearest == len(places)
    lost[~lost] = places["at"][nearest[~lost]] != found["at"][~lost].view(np.uint64)
    if lost.any():
        _refuse(path, f"the pixels of image {int(lost.argmax())} are not where it says")
    found["size"] = places["size"][nearest]
    height, width, channels = shape
    odd = np.where(found["jpeg"], found["size"] == 0, found["size"] != height * width * channels)
    if odd.any():
        _refuse(path, f"image {int(odd.argmax())} has not the bytes of its size")
    return shape, found


def _rgb_shape(path: Path, records: Array) -> tuple[int, int, int]:
    if not np.isin(records["mode"], (_JPEG, _RAW)).all():
        _refuse(path, "has images that are neither raw nor JPEG")
    height, width = int(records["height"][0]), int(records["width"][0])
    other = (records["height"] != height) | (records["width"] != width)
    if other.any():
        at = int(other.argmax())
        found = f"{records['width'][at]}x{records['height'][at]}"
        sizes = f"image 0 is {width}x{height}, image {at} {found}"
        _refuse(path, f"has images of different sizes ({sizes})", "resize them all before writing")
    if not height or not width:
        _refuse(path, "has images without pixels")
    return height, width, 3


def _array_shape(path: Path, arguments: Bytes) -> tuple[int, int, int]:
    """Read a field's 32 dimensions, the length of its dtype and its dtype, as JSON."""
    dimensions = arguments[:256].view("<u8").tolist()
    length = int(arguments[256:264].view("<u8")[0])
    if arguments[264 : 264 + min(length, 760)].tobytes() != _ARRAY_OF_BYTES:
        _refuse(path, "has arrays that are not of uint8")
    while dimensions and not dimensions[-1]:
        dimensions.pop()
    height, width, channels = (*dimensions, 1)[:3] if len(dimensions) in (2, 3) else (0, 0, 0)
    if not height or not width or channels not in (1, 3):
        _refuse(path, f"has arrays of shape {dimensions}, not [H, W], [H, W, 1] or [H, W, 3]")
    return height, width, channels


def _check_places(path: Path, places: Array, start: int, end: int, page_bytes: int) -> None:
    """Refuse places outside the pixels, and images on two pages, which FFCV would cut off."""
    at, size = places["at"], places["size"]
    if page_bytes < 1 or page_bytes & (page_bytes - 1):
        _refuse(path, f"has pages of {page_bytes} bytes, which is no power of two")
    if not ((at >= start) & (at <= end)).all() or not (size <= end - at).all():
        _refuse(path, "points outside itself")
    if not (at % page_bytes + size <= page_bytes).all():
        _refuse(path, "has images that lie on two pages")


def _choose(path: Path, role: str, names: list[str], fits: list[bool]) -> int:
    """Return the field of this name, or the only one of its kind."""
    able = [at for at, fit in enumerate(fits) if fit]
    named = [at for at in able if names[at] == role]
    if len(named) != 1 and len(able) != 1:
        found = ", ".join(names)
        number = "no" if not able else "more than one"
        _refuse(path, f"has {number} field that may be the {role} (it has: {found})")
    return named[0] if len(named) == 1 else able[0]


def _name(path: Path, field: Any) -> str:
    name = field["name"].tobytes().split(b"\0")[0]
    if not name.isascii():
        _refuse(path, "has a field whose name is not ASCII")
    return str(name.decode("ascii"))


def _refuse(path: Path, reason: str, cure: str = "convert the set again") -> NoReturn:
    raise BetonError(f"{path}: {reason}; {cure}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise BetonError(f"{path}: not found") from error
    except (OSError, MemoryError) as error:
        raise BetonError(f"{path}: cannot be read ({error})") from error

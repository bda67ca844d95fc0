"""A folder of .beton files: train.beton, test.beton and dataset.json, which says what they hold.

Where train-indices.npy stands beside them, the training set is those images, in that order.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

import reat_fast
from reat_fast.sources.beton_file import read_beton
from reat_fast.sources.formats import DataError, Source, checked, reading
from reat_fast.sources.lazy import LazyImages, decode_all
from reat_fast.sources.lists import refuse_or_note

if TYPE_CHECKING:
    from reat_fast.data import ImageSet

VERSION = 1
PARTS = ("train", "test")
DESCRIPTION = "dataset.json"
INDICES = "train-indices.npy"
FILES = (*(f"{part}.beton" for part in PARTS), DESCRIPTION, INDICES)
_CURE = "give the folder that `python -m reat_fast.convert` wrote, or convert the set again"
_SMALL_PAGE, _PAGE, _LARGEST_PAGE = 1 << 21, 1 << 23, 1 << 31  # bytes; the smallest is FFCV's


def read(folder: Path) -> Source:
    """Read such a folder, its images lazily; raises DataError, or BetonError of a damaged file."""
    description = read_description(folder)
    arrays: list[Any] = []
    names = []
    for part in PARTS:
        file = folder / f"{part}.beton"
        beton = read_beton(file)
        count = description[part]["images"]
        if len(beton.labels) != count:
            raise DataError(
                f"{file}: {len(beton.labels)} images, {DESCRIPTION} says {count}; {_CURE}"
            )
        arrays += [beton.images, beton.labels]
        names += [f"{file} (images)", f"{file} (labels)"]
    if (folder / INDICES).is_file():
        rows = _read_indices(folder / INDICES, len(arrays[1]))
        arrays[:2] = arrays[0].take(rows), arrays[1][rows]
    return Source(arrays, names, tuple(description["class_names"]))


def read_description(folder: Path) -> dict[str, Any]:
    """Read and check dataset.json; raises DataError."""
    file = folder / DESCRIPTION
    with reading(file, _CURE):
        description = json.loads(file.read_text("utf-8"))
        version, names = description["version"], description["class_names"]
        if version != VERSION:
            raise DataError(
                f"{file}: is of version {version}, not {VERSION}; convert the set again"
            )
        counts = [description[part]["images"] for part in PARTS]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("class_names is no list of names")
        if not all(isinstance(count, int) for count in counts):
            raise ValueError("images is no number")
    return dict(description)


def _read_indices(file: Path, count: int) -> npt.NDArray[np.int64]:
    with reading(file, "draw it again with `python -m reat_fast.convert --split index`"):
        rows = np.load(file, allow_pickle=False)
        if rows.ndim != 1 or rows.dtype.kind not in "iu" or not len(rows):
            raise ValueError("it is no list of positions")
        if rows.min() < 0 or rows.max() >= count or len(np.unique(rows)) < len(rows):
            raise ValueError(f"positions must be different ones of 0..{count - 1}")
    return np.asarray(rows, np.int64)


def write(
    folder: Path,
    parts: dict[str, ImageSet],
    description: dict[str, Any],
    rows: npt.NDArray[np.int64] | None = None,
    quality: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Make such a folder of the parts "train" and "test".

    description: what dataset.json is to say, class_names at least. rows: the positions that make up
    the training set, kept as train-indices.npy. quality and errors: see write_beton.
    """
    folder.mkdir()
    description = {"version": VERSION, "reat_fast": reat_fast.__version__, **description}
    description["image_shape"] = list(parts["train"].images.shape[1:])
    for part, image_set in parts.items():
        file, (images, labels) = folder / f"{part}.beton", (image_set.images, image_set.labels)
        fingerprint = write_beton(file, images, labels, quality=quality, progress=progress)
        counts = np.bincount(labels, minlength=len(description["class_names"])).tolist()
        numbers = {"images": len(labels), "counts": counts, "fingerprint": fingerprint}
        description[part] = numbers
    if rows is not None:
        np.save(folder / INDICES, rows)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", "utf-8")
    checked(read(folder))  # is it whole, as far as its tables tell?


def write_beton(
    file: Path,
    images: npt.NDArray[np.uint8] | LazyImages,
    labels: npt.NDArray[np.int64],
    *,
    quality: int | None = None,
    progress: Callable[[], object] = lambda: None,
) -> str:
    """Write images and labels with FFCV and return the sha256 of what was written, see digest.

    quality: of JPEG; None keeps the pixels. Grey images are kept as plain arrays. FFCV's writer
    waits for ever when one of its processes fails, so its parts run here, in this process: whatever
    goes wrong is raised. Raises DataError naming all images that cannot be decoded, and OSError.
    """
    ffcv = _import_writer()
    fields = _fields(images.shape[1:], quality)
    writer = ffcv.DatasetWriter(str(file), fields, _page_size(images), num_workers=1)
    writer.num_samples = len(labels)
    writer.prepare()
    try:
        records = np.zeros(len(labels), writer.metadata_type)
        pages = ffcv.MemoryAllocator(str(file), writer.data_region_start, writer.page_size)
        hashed = digest(images.shape, labels)
        damaged: dict[int, str] = {}
        pages.__enter__()
        with closing(pages.fp):  # leaving `with pages` after an error would write once more
            for at, image in enumerate(decode_all(images)):
                progress()
                if isinstance(image, str):
                    damaged[at] = image
                    continue
                hashed.update(image.tobytes())
                sample = (image, int(labels[at]))
                ffcv.handle_sample(sample, at, records.dtype.names, records, pages, fields)
            pages.flush_page()
        refuse_or_note(damaged, len(labels), skip_bad=False)
        written = pages.offset + pages.next_page_allocated.value * pages.page_size
        if file.stat().st_size != written:  # FFCV does not look at how much the disk took
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        writer.metadata_sm.buf[: records.nbytes] = records.tobytes()
        writer.finalize(pages.allocations)
    finally:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
    return hashed.hexdigest()


def digest(shape: tuple[int, ...], labels: npt.NDArray[np.int64]) -> hashlib._Hash:
    """Begin the fingerprint of a part: sha256 of shape and labels (int64) and then all pixels."""
    hashed = hashlib.sha256(np.array(shape, "<i8").tobytes())
    hashed.update(labels.astype("<i8").tobytes())
    return hashed


def _import_writer() -> ModuleType:
    import torch

    threads = torch.get_num_threads()
    try:
        import ffcv.writer
    except ImportError as error:
        raise DataError(
            f".beton files are written by FFCV: install it with scripts/ffcv.sh, or convert to "
            f"FILE.npz ({error})"
        ) from error
    finally:
        torch.set_num_threads(threads)  # the import takes all but one away
    return cast(ModuleType, ffcv.writer)


def _fields(shape: tuple[int, ...], quality: int | None) -> dict[str, Any]:
    """Return the fields of an image [H, W, C] and its label; FFCV's image field is RGB only."""
    from ffcv.fields import IntField, NDArrayField, RGBImageField

    if shape[2] != 1:
        mode = {"write_mode": "raw"} if quality is None else {"write_mode": "jpg"}
        return {"image": RGBImageField(**mode, jpeg_quality=quality or 90), "label": IntField()}
    if quality is not None:
        raise DataError("--field jpg: FFCV keeps RGB images only as JPEG; use --field raw for grey")
    return {"image": NDArrayField(np.dtype(np.uint8), shape), "label": IntField()}


def _page_size(images: npt.NDArray[np.uint8] | LazyImages) -> int:
    """Return FFCV's page in bytes: a file is at least one, and an image lies within one."""
    image = math.prod(images.shape[1:])
    page = _SMALL_PAGE if images.nbytes < 8 * _PAGE else _PAGE
    while page < 2 * image:  # noise as JPEG is larger than its pixels
        page *= 2
    if page > _LARGEST_PAGE:
        cure = "give --image-size N"
        raise DataError(f"images of {image} bytes are too large for FFCV's pages; {cure}")
    return page

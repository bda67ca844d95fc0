"""Images that stay in their files until they are read, for sets larger than memory.

They stand where an array uint8 [N, H, W, C] stands and are indexed like one along the first axis;
each access decodes anew, so that equal indices give equal pixels and nothing is kept.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from reat_fast.sources.formats import Array, DataError, reading

if TYPE_CHECKING:
    from PIL import Image

Bytes = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]

MOST_PIXELS = 2**28  # of a resized image, before it is cut: under 1 GiB
BLOCK = 16  # images that a thread decodes at a time
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # at most 8 bits a channel


class LazyImages(ABC):
    """Stand for uint8 [N, H, W, C] that is decoded on demand; a subclass says how in `read`."""

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, shape: tuple[int, int, int, int]) -> None:
        self.shape = shape

    @abstractmethod
    def read(self, indices: Rows) -> Bytes:
        """Decode the images at `indices`, int64 [B] in 0..N-1, into uint8 [B, H, W, C]."""

    def take(self, indices: npt.ArrayLike) -> LazyImages:
        """Return the images at `indices` as another set, decoding none."""
        return LazyView(self, self._rows(indices))

    @property
    def nbytes(self) -> int:
        """Return the bytes of the pixels, decoded."""
        images, height, width, channels = self.shape
        return images * height * width * channels

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | npt.ArrayLike) -> Bytes:
        """Decode one image [H, W, C], or those at a slice or at positions [B, H, W, C]."""
        if isinstance(index, tuple):
            raise TypeError("lazy images are indexed along their first axis only")
        if isinstance(index, slice):
            return self.read(np.arange(len(self), dtype=np.int64)[index])
        rows = self._rows(index)
        return self.read(rows) if rows.ndim else self.read(rows[None])[0]

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("lazy images cannot become an array without being decoded")
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def _rows(self, indices: npt.ArrayLike) -> Rows:
        """Resolve positions as numpy does: from the end where negative, a mask of bools too."""
        chosen = np.asarray(indices)
        chosen = chosen if chosen.size else chosen.astype(np.int64)  # numpy makes [] of floats
        return np.asarray(np.arange(len(self), dtype=np.int64)[chosen])


class LazyView(LazyImages):
    """Show the images of `source` at `rows`, int64 [N], which are positions in the source."""

    def __init__(self, source: LazyImages, rows: Rows) -> None:
        super().__init__((len(rows), *source.shape[1:]))
        self.source = source
        self.rows = rows

    def read(self, indices: Rows) -> Bytes:
        """Decode the images at `indices`."""
        return self.source.read(self.rows[indices])

    def take(self, indices: npt.ArrayLike) -> LazyView:
        """Return a view of the same source, so that views of views cost nothing."""
        return LazyView(self.source, self.rows[self._rows(indices)])


class FileImages(LazyImages):
    """Read image files of any size as `size` x `size` pixels, RGB.

    The short side is resized to `size` (bilinear, antialiased) and the centre cut out, as the
    evaluation transform of ImageNet does. Needs pillow; raises DataError naming a damaged file.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        if size < 1:
            raise DataError(f"image size must be at least 1 pixel, got {size}")
        require_pillow()
        super().__init__((len(paths), size, size, 3))
        self.paths = list(paths)

    def read(self, indices: Rows) -> Bytes:
        """Decode the files at `indices`."""
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for image, index in zip(images, indices.tolist(), strict=True):
            with decoding(self.paths[index]) as decoded:
                image[:] = self._fit(decoded)
        return images

    def take(self, indices: npt.ArrayLike) -> FileImages:
        """Return the files at `indices`."""
        paths = [self.paths[index] for index in self._rows(indices).tolist()]
        return FileImages(paths, self.shape[1])

    def _fit(self, image: Image.Image) -> Bytes:
        size = self.shape[1]
        image = image.convert("RGB")
        width, height = image.size
        short = min(width, height)
        if short != size:
            width, height = (int(size * side / short) for side in (width, height))
            if width * height > MOST_PIXELS:  # of which a square of size x size would be left
                raise ValueError(f"{image.width}x{image.height} pixels are too thin to be resized")
            image = image.resize((width, height), resample=2)  # 2: bilinear, of PIL.Image
        left, top = round((width - size) / 2), round((height - size) / 2)
        return np.asarray(image.crop((left, top, left + size, top + size)), np.uint8)


def require_pillow() -> None:
    """Raise DataError with the pip line where pillow is missing, which no file is to blame for."""
    try:
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError as error:
        raise DataError('image files need pillow: pip install "reat-fast[images]"') from error


@contextmanager
def decoding(file: Path) -> Iterator[Image.Image]:
    """Give an image file as an 8-bit pillow image; raises DataError naming the file."""
    from PIL import Image

    with reading(file, "replace it, or leave it out with --skip-bad"), Image.open(file) as image:
        if image.mode not in _MODES:
            raise DataError(f"{file}: mode {image.mode} is not 8-bit; save it as RGB or grey")
        yield image


def decode_all(images: Bytes | LazyImages) -> Iterator[Bytes | str]:
    """Give every image [H, W, C] in order or, where it cannot be decoded, the reason.

    Threads decode a bounded number of images ahead.
    """
    if isinstance(images, np.ndarray):
        yield from images
        return

    def decode(rows: range) -> list[Bytes | str]:
        try:
            return list(images.read(np.array(rows)))
        except ValueError as error:  # DataError, or what another kind of LazyImages raises
            if len(rows) == 1:
                return [str(error)]
            return [image for row in rows for image in decode(range(row, row + 1))]

    threads = os.cpu_count() or 1
    starts = range(0, len(images), BLOCK)
    blocks = [range(start, min(start + BLOCK, len(images))) for start in starts]
    with ThreadPoolExecutor(threads) as pool:  # pillow decodes without the lock
        ahead: Iterator[list[Bytes | str]] = iter(())
        for first in range(0, len(blocks) + threads, threads):
            current, ahead = ahead, pool.map(decode, blocks[first : first + threads])
            for decoded in current:
                yield from decoded


def find_damaged(images: LazyImages) -> dict[int, str]:
    """Decode all images and return the positions that cannot be, each with the reason."""
    bar = tqdm(decode_all(images), "decoding", len(images), unit=" images", disable=None)
    return {index: image for index, image in enumerate(bar) if isinstance(image, str)}

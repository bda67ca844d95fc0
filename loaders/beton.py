"""Batches decoded by FFCV's threads from a .beton file, in the order of all other loaders.

FFCV decodes; order, subset and shares are ours, and its augmentations are not used: they draw from
generators that no seed reaches. What FFCV does not check (positions, the tables of the file) or
undo (a thread for each abandoned epoch, torch's number of threads) is checked and undone here.
Tried with FFCV 1.0.2.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reat_fast.data import ImageSet
from reat_fast.loaders import Batch
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.prefetch import to_device
from reat_fast.sources.beton_file import BetonError, BetonFile, BetonImages, read_beton

Rows = npt.NDArray[np.int64]


class BetonLoader:
    """Give batches that FFCV decodes from the .beton file at `path`.

    rows: int64 [N], the position in the file of each image of the set; left out, those that
    `image_set.images` was read from, or the whole file in its order. workers: threads that decode,
    at most one per core; JPEG gains from more than one, raw pixels hardly.

    The first epoch begins some seconds late, while Numba compiles the decoder. Raw pixels are
    exact. JPEG is decoded with libjpeg's fast cosine transform: CIFAR-10 at quality 95 is off from
    pillow's pixels by 1.7 of 255 on average and 22 at most. A JPEG that is damaged inside goes
    unnoticed by FFCV: `python -m reat_fast.convert --check` finds it. Raises ValueError where FFCV
    is missing, and BetonError where file, rows and image_set do not agree.
    """

    def __init__(
        self,
        image_set: ImageSet,
        order: EpochOrder,
        device: torch.device,
        *,
        path: Path,
        rows: Rows | None = None,
        workers: int = 2,
    ) -> None:
        if workers < 0:
            raise ValueError(f"--workers {workers}: must be 0 or more")
        beton = read_beton(path)
        self._rows = _check_rows(image_set, beton, rows)
        self._labels = torch.from_numpy(image_set.labels)
        self._shape = image_set.images.shape[1:]
        self.order = order.to(torch.device("cpu"))
        self.device = device
        self._given = _GivenOrder()
        self._ffcv: Any = _ffcv_loader(beton, self._rows, order.share, workers)
        self._ffcv.traversal_order = self._given

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch, from batch `first` on, without reading those before."""
        return to_device(self._decoded(list(self.order.batches(epoch, first))), self.device)

    def close(self) -> None:
        """Let go of the file and FFCV's buffers."""
        self._ffcv = None

    def _decoded(self, shares: list[Tensor]) -> Iterator[Batch]:
        """Give the batches on the CPU, copied: FFCV uses its buffers again."""
        if self._ffcv is None:
            raise ValueError("the FFCV loader is closed: make another")
        rows = [self._rows[share.numpy()] for share in shares if len(share)]
        running = self._start(np.concatenate(rows)) if rows else None
        pinned = self.device.type == "cuda"
        try:
            for share in shares:
                shape = (len(share), *self._shape)
                images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
                if running is not None and len(share):
                    images.copy_(_next(running).view(shape))
                yield Batch(images, self._labels[share], share, gather=False)
        finally:
            if running is not None:
                _stop(running)

    def _start(self, rows: Rows) -> Any:
        """Let FFCV's threads begin with an epoch of these rows of the file."""
        self._given.rows = rows
        with _torch_threads_kept():
            return iter(self._ffcv)


class _GivenOrder:
    """Stand where FFCV's loader has its TraversalOrder, and give the rows that were set."""

    rows: Rows

    def sample_order(self, epoch: int) -> Rows:
        return self.rows


def _ffcv_loader(beton: BetonFile, rows: Rows, batch_size: int, workers: int) -> Any:
    with _torch_threads_kept():
        try:
            from ffcv.loader import Loader, OrderOption
        except ImportError as error:
            raise ValueError(
                "--loader ffcv needs FFCV: run scripts/ffcv.sh in a checkout, or install "
                "libopencv-dev, libturbojpeg0-dev, pkg-config and g++ and then "
                f'pip install "reat-fast[ffcv]" ({error})'
            ) from error
        return Loader(
            str(beton.path),
            batch_size=batch_size,
            num_workers=_threads(workers),
            os_cache=True,  # FFCV's own cache holds the whole file where the order is random
            order=OrderOption.SEQUENTIAL,
            indices=rows,
            pipelines={name: None for name in beton.fields if name != beton.image_field},
            drop_last=False,
        )


def _threads(workers: int) -> int:
    """Return how many threads may decode; Numba does not start more than there are cores."""
    config: Any = importlib.import_module("numba.core.config")
    if config.THREADING_LAYER != "workqueue":
        for pool in ("tbbpool", "omppool"):
            with suppress(ImportError):
                importlib.import_module(f"numba.np.ufunc.{pool}")
                return min(max(workers, 1), int(config.NUMBA_NUM_THREADS))
    return 1  # workqueue, Numba's last resort, aborts the process when two loaders are at work


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Undo that FFCV gives torch the number of its own threads, on import and in each epoch."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _next(running: Any) -> Tensor:
    """Return the next batch, uint8 in FFCV's buffer, valid until the next call.

    FFCV's own __next__ waits for ever where its thread has failed.
    """
    while True:
        with suppress(Empty):
            _, (images,) = running.output_queue.get(timeout=1.0)
            return cast(Tensor, images)
        if not running.is_alive() and running.output_queue.empty():
            path = running.loader.fname
            raise BetonError(f"{path}: FFCV stopped reading it, the reason stands above")


def _stop(running: Any) -> None:
    """End the thread of an epoch, wherever it is."""
    running.iter_ixes = iter(())
    while running.is_alive():
        with suppress(Empty):
            running.output_queue.get(timeout=0.01)
    running.close()


def _check_rows(image_set: ImageSet, beton: BetonFile, rows: Rows | None) -> Rows:
    """Return the rows of the file that the images of the set are, checked by shape and label."""
    path, images, count = beton.path, image_set.images, len(beton.labels)
    if rows is None:
        same = isinstance(images, BetonImages) and images.path == path
        rows = cast(BetonImages, images).rows if same else np.arange(count, dtype=np.int64)
    if images.shape[1:] != beton.images.shape[1:]:
        raise BetonError(
            f"{path}: its images are {list(beton.images.shape[1:])}, those of the training set "
            f"{list(images.shape[1:])}; convert the set again"
        )
    if len(rows) != len(image_set):
        raise BetonError(
            f"{path}: {len(rows)} images for a training set of {len(image_set)}; give the rows of "
            "the file that the set consists of"
        )
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        found = f"{rows.min()}..{rows.max()}"
        raise BetonError(f"{path}: rows must be in 0..{count - 1}, got {found}")
    rows = rows.astype(np.int64)
    other = beton.labels[rows] != image_set.labels
    if other.any():
        at = int(other.argmax())
        raise BetonError(
            f"{path}: image {rows[at]} has label {beton.labels[rows[at]]}, in the training set it "
            f"has {image_set.labels[at]}; convert the set again, or give other rows"
        )
    return rows

"""NVIDIA DALI: native threads gather or decode the batches, and on a GPU copy them ahead.

The pipeline is fed positions of the common order, never a reader of its own, so that DALI shows the
same images in the same order. Arrays give the same bytes as every loader. Files are cut to the same
pixels as `FileImages` cuts them, but decoded and resized by DALI, which rounds in its own way.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from torch import Tensor

from reat_fast.cli.extras import import_extra
from reat_fast.cli.terminal import first_line
from reat_fast.data import Images, ImageSet
from reat_fast.loaders import Batch
from reat_fast.loaders.order import EpochOrder
from reat_fast.sources.lazy import FileImages

PREFETCH = 2  # batches in the pipeline


class DaliLoader:
    """Give batches that a DALI pipeline prepares ahead on `threads` threads.

    On a CUDA device JPEG files are decoded there ("mixed"). Raises ValueError in one line where
    DALI is missing and where an image cannot be read, which also ends the pipeline.
    """

    def __init__(
        self, image_set: ImageSet, order: EpochOrder, device: torch.device, *, threads: int = 2
    ) -> None:
        if threads < 1:
            raise ValueError(f"--workers {threads}: DALI needs at least 1 thread")
        self.order = order.to(torch.device("cpu"))
        self.device = device
        self.labels = torch.from_numpy(image_set.labels).to(device)
        self.images = image_set.images
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._feed = _Feed(self.images)
        self._begun = 0  # epochs, of which only the last can be read on
        self._pipe: Any = _pipeline(self._feed, order.share, threads, device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch, from batch `first` on."""
        if self._pipe is None:
            raise ValueError("the DALI loader is closed: make another")
        batches = list(self.order.batches(epoch, first))
        there = self.order.to(self.device).batches(epoch, first)  # a copy would wait for the step
        self._begun += 1
        begun = self._begun
        self._drain(batches)  # an epoch that nobody reads on may be alive still
        self._feed.ahead = (rows for rows in batches if len(rows))  # DALI knows no empty batch
        number = 0
        try:
            for number, (rows, indices) in enumerate(zip(batches, there, strict=True)):
                if begun != self._begun:
                    raise ValueError("DALI loader: a later epoch was begun; read one at a time")
                images = self._copy(self._run(batches[number:])) if len(rows) else self._empty()
                yield Batch(images, self.labels[indices], indices, gather=False)
        finally:
            if begun == self._begun:
                self._drain(batches[number:])

    def close(self) -> None:
        """End the pipeline and its threads."""
        self._pipe = None

    def _drain(self, batches: list[Tensor]) -> None:
        """Drop what is read ahead of an abandoned epoch: it must not come out in the next."""
        self._feed.ahead = iter(())
        while self._pipe is not None and self._run(batches) is not None:
            pass

    def _run(self, batches: list[Tensor]) -> Any:
        """Wait for the first of these batches; returns None where the epoch is over."""
        try:
            return self._pipe.run()[0]
        except StopIteration:
            self._pipe.reset()
            return None
        except RuntimeError as error:  # the pipeline is of no use after one
            self.close()
            raise self._fault(batches[: PREFETCH + 1], error) from error

    def _copy(self, images: Any) -> Tensor:
        """Copy a batch, since DALI writes a later one into the same memory."""
        # On a stream of its own: to wait for the copy is then not to wait for the training step.
        with torch.cuda.stream(self._stream):
            copy = torch.utils.dlpack.from_dlpack(images.as_tensor()).clone()
        if self._stream is not None:
            self._stream.synchronize()
            copy.record_stream(torch.cuda.current_stream(self.device))
        return copy

    def _empty(self) -> Tensor:
        return torch.zeros((0, *self.images.shape[1:]), dtype=torch.uint8, device=self.device)

    def _fault(self, batches: list[Tensor], error: RuntimeError) -> ValueError:
        """Find the damaged file, which DALI does not name."""
        if isinstance(self.images, FileImages):
            try:
                for rows in batches:
                    self.images.read(rows.numpy())
            except ValueError as named:
                return named
        reason = str(error).partition("encountered:")[2].strip().partition("\n")[0]
        return ValueError(
            f"--loader dali: DALI cannot read a batch ({reason or first_line(error)}); "
            "use --loader workers"
        )


class _Feed:
    """Give the pipeline batches of images, or of names of files, as arrays of bytes.

    Apart from the loader, or loader and pipeline would hold each other: the pipeline might then be
    freed in a process forked later, which would wait for its threads for ever.
    """

    def __init__(self, images: Images) -> None:
        self.images = images
        self.ahead: Iterator[Tensor] = iter(())

    def __call__(self) -> Any:
        rows = next(self.ahead)
        if isinstance(self.images, FileImages):
            paths = [os.fsencode(self.images.paths[row]) for row in rows.tolist()]
            return [np.frombuffer(path, np.uint8) for path in paths]
        return self.images[rows.numpy()]


def _pipeline(source: _Feed, batch_size: int, threads: int, device: torch.device) -> Any:
    dali = import_extra("nvidia.dali", "--loader dali", "dali")
    gpu = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if gpu else None
    pipe = dali.Pipeline(batch_size, threads, index, prefetch_queue_depth=PREFETCH)
    with pipe:
        feed = functools.partial(dali.fn.external_source, source, dtype=dali.types.UINT8)
        if isinstance(source.images, FileImages):
            pixels = _decoded(feed(ndim=1), source.images, "mixed" if gpu else "cpu")
        else:
            pixels = feed(ndim=3, layout="HWC")
        pipe.set_outputs(pixels.gpu() if gpu else pixels)
    pipe.build()
    return pipe


def _decoded(paths: Any, images: FileImages, place: str) -> Any:
    """Decode, resize and cut as `FileImages` does: the same rectangle of the same size."""
    dali = import_extra("nvidia.dali", "--loader dali", "dali")
    fn, types = dali.fn, dali.types
    size = images.shape[1]
    pixels = fn.decoders.image(
        fn.io.file.read(paths),
        device=place,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,  # on a GPU, as on a CPU
    )
    sides = fn.cast(pixels.shape()[:2], dtype=types.INT32)
    sides = size * sides // fn.reductions.min(sides)
    pixels = fn.resize(
        pixels,
        size=fn.cast(sides, dtype=types.FLOAT),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
    )
    beyond = sides - size
    start = beyond // 2 + (beyond & (beyond // 2) & 1)  # half of it, rounded half to even
    return fn.slice(pixels, start=start, shape=[size, size], axes=[0, 1])

"""torch's DataLoader over the common order: worker processes read the batches, the baseline.

Each item of the DataLoader is a whole batch of bytes, gathered or decoded in a worker; nothing but
uint8 crosses processes.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from reat_fast.cli.terminal import first_line
from reat_fast.data import ImageSet
from reat_fast.loaders import Batch
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.prefetch import to_device
from reat_fast.sources.lazy import LazyImages

PREFETCH = 4  # batches that each worker reads ahead


class WorkersLoader:
    """Give batches that worker processes read ahead; they live from the first epoch to `close`.

    workers: processes; 0 reads in this one. Raises ValueError in one line where an image cannot be
    read or a worker dies.
    """

    def __init__(
        self, image_set: ImageSet, order: EpochOrder, device: torch.device, *, workers: int = 2
    ) -> None:
        if workers < 0:
            raise ValueError(f"--workers {workers}: must be 0 or more")
        self.order = order.to(torch.device("cpu"))
        self.device = device
        self._labels = torch.from_numpy(image_set.labels)
        self._rows: list[npt.NDArray[np.int64]] = []  # the sampler: what the next epoch reads
        self._begun = 0  # epochs, of which only the last can be read on
        self._loader: DataLoader[Tensor | str] | None = DataLoader(
            _Batches(image_set.images),
            batch_size=None,
            sampler=self._rows,
            num_workers=workers,
            persistent_workers=workers > 0,
            prefetch_factor=PREFETCH if workers else None,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # or each epoch would draw from the global one
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch, from batch `first` on."""
        return to_device(self._read(epoch, first), self.device)

    def close(self) -> None:
        """End the workers."""
        self._loader = None

    def _read(self, epoch: int, first: int) -> Iterator[Batch]:
        if self._loader is None:
            raise ValueError("the workers loader is closed: make another")
        batches = list(self.order.batches(epoch, first))
        self._rows[:] = [rows.numpy() for rows in batches]
        self._begun += 1
        begun = self._begun
        with self._explained(), _left_to_the_run():
            read = iter(self._loader)
        for rows in batches:
            if begun != self._begun:
                raise ValueError("workers loader: a later epoch was begun; read one at a time")
            with self._explained():
                images = next(read)
            if isinstance(images, str):
                raise ValueError(f"--loader workers: {images}")
            yield Batch(images, self._labels[rows], rows, gather=False)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # raised by torch where a worker is gone
            reason = first_line(error)
            self.close()
            raise ValueError(
                f"--loader workers: a worker process died ({reason}), as happens when memory runs "
                "out; lower --workers or --batch-size"
            ) from error


@contextmanager
def _left_to_the_run() -> Iterator[None]:
    """Start workers that leave signals, and their own end, to the run.

    What ends a whole group of processes must not end them: the run still takes a step. Blocked
    signals stay so in a child. And torch's handler for the end of a child raises wherever the main
    thread is just then, in a step or in a save; the next read finds a dead worker as well.
    """
    if sys.platform == "win32":  # which has neither
        yield
        return
    of_children = signal.getsignal(signal.SIGCHLD)
    others = multiprocessing.active_children()
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if of_children is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, of_children)
        started = [child for child in multiprocessing.active_children() if child not in others]
        if started:  # Python ends by SIGTERM what nobody closed, and would wait for ever
            atexit.register(_kill, started)


def _kill(processes: Iterable[BaseProcess]) -> None:
    for process in processes:
        process.kill()


class _Batches(Dataset["Tensor | str"]):
    """Read a batch at a time; what goes wrong in a worker comes back as one line of text."""

    def __init__(self, images: npt.NDArray[np.uint8] | LazyImages) -> None:
        self.images = images

    def __getitem__(self, rows: npt.NDArray[np.int64]) -> Tensor | str:
        try:
            return torch.from_numpy(self.images[rows])
        except Exception as error:  # a decoder of damaged bytes raises nearly anything
            return " ".join(str(error).split()) or type(error).__name__

"""The loader of worker processes: what goes wrong in them, and that they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
import torch

from reat_fast.data import ImageSet
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.workers import WorkersLoader
from reat_fast.sources.lazy import LazyImages

CPU = torch.device("cpu")


class Numbers(LazyImages):
    """Images full of their own position; `fault` is what reading position 5 does."""

    def __init__(self, count: int, fault: str = "") -> None:
        super().__init__((count, 2, 2, 1))
        self.fault = fault

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        if self.fault and 5 in indices:
            if self.fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(self.fault)
        return np.broadcast_to(indices[:, None, None, None], (len(indices), 2, 2, 1)).astype("u1")


def make(fault: str = "", workers: int = 2, count: int = 12) -> WorkersLoader:
    labels = np.arange(count) % 3
    return WorkersLoader(
        ImageSet(Numbers(count, fault), labels), EpochOrder(labels, 4), CPU, workers=workers
    )


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_lazy_images_are_read_by_the_workers(workers: int) -> None:
    loader = make(workers=workers)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)
    assert len(multiprocessing.active_children()) == workers  # the same ones in both epochs
    loader.close()


def test_the_workers_end_with_the_loader() -> None:
    before = multiprocessing.active_children()
    loader = make()
    iterator = loader.epoch(0)
    next(iterator)
    started = [p for p in multiprocessing.active_children() if p not in before]
    assert len(started) == 2
    iterator.close()  # type: ignore[attr-defined]
    loader.close()
    loader.close()
    assert not any(process.is_alive() for process in started)
    with pytest.raises(ValueError, match="the workers loader is closed: make another"):
        next(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_one_line(workers: int) -> None:
    loader = make("five.png: broken;\n replace it", workers)
    with pytest.raises(ValueError, match=r"^--loader workers: five.png: broken; replace it$"):
        list(loader.epoch(0))
    loader.close()


def test_a_worker_that_dies_is_one_line() -> None:
    loader = make("dies")
    message = r"^--loader workers: a worker process died \(.*\), as .*; lower --workers .*$"
    with pytest.raises(ValueError, match=message):
        list(loader.epoch(0))


def test_a_worker_that_is_killed_is_named_by_the_next_read_and_disturbs_nothing_before() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    others = multiprocessing.active_children()
    loader = make(count=400)
    batches = loader.epoch(0)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is before  # torch's raises wherever the run just is
    started = [p for p in multiprocessing.active_children() if p not in others]
    for process in started:
        process.kill()
        process.join()
    with pytest.raises(ValueError, match="^--loader workers: a worker process died"):
        list(batches)
    loader.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_workers_live_on_where_a_signal_meets_the_whole_group(number: int) -> None:
    others = multiprocessing.active_children()
    loader = make(count=400)
    batches = loader.epoch(0)
    read = [next(batches)]
    for process in multiprocessing.active_children():
        if process not in others:
            os.kill(process.pid or 0, number)
    read += batches
    assert sum(len(batch.labels) for batch in read) == 400
    loader.close()


def test_a_program_ends_though_nobody_closed_the_loader() -> None:
    script = (
        "from test_workers import make\n"
        "batches = make().epoch(0)\n"
        "next(batches)\n"
        "raise RuntimeError('of the program')"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == 1 and ended.stderr.endswith("RuntimeError: of the program\n")


@pytest.mark.parametrize("workers", [0, 2])
def test_two_epochs_at_once_are_refused_and_the_later_one_is_whole(workers: int) -> None:
    loader = make(workers=workers)
    earlier, later = loader.epoch(0), loader.epoch(1)
    next(earlier)
    first = next(later)
    with pytest.raises(ValueError, match="^workers loader: a later epoch was begun; read one"):
        next(earlier)
    for batch in (first, *later):
        assert torch.equal(batch.images[:, 0, 0, 0].long(), batch.indices)
    loader.close()


def test_an_epoch_leaves_the_global_random_numbers_alone() -> None:
    loader = make(workers=0)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(ValueError, match="^--workers -1: must be 0 or more$"):
        make(workers=-1)

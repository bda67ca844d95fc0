"""Several processes that train one model: torchrun starts them, each takes its share of a batch.

A step sums gradients and statistics over the processes in one collective, so that weights, totals
and histogram are the same in all of them, and equal to those of one process on the whole batch.
No hooks and no buckets: the same body can be captured in a CUDA graph.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

# Connecting takes seconds, unless a process is missing. Later one may wait while another
# attacks its share of an evaluation; a dead process is noticed at once all the same.
CONNECT, WAIT = timedelta(seconds=60), timedelta(hours=12)

FAILURES = (ArithmeticError, MemoryError, OSError, RuntimeError, ValueError)
"""What a process tells the user of; all else, as a stop, is no failure."""

PRECEDENCE_SECONDS = 1.0
"""By which the main process, which knows the folder of the run, may tell of a failure first."""


class FailedElsewhere(Exception):
    """Another process of this job has failed, and tells the user why."""


@dataclass(frozen=True)
class World:
    """The processes of a job and the place of this one among them; one alone by default."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    """Processes of the job on this machine."""

    @classmethod
    def from_environment(cls) -> World:
        """Read what torchrun tells its processes; a process by itself is a world of one."""
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        return cls(*(int(os.environ.get(name, value)) for name, value in alone.items()))

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    @property
    def restarts(self) -> int:
        """How often torchrun has started this job again."""
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

    @contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connect the processes for as long as the block runs.

        Errors: ConnectionError in one line where another process of the job is lost or not found.
        FailedElsewhere in place of an error where another process tells of its own.
        """
        if self.size == 1:
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        try:
            store = self._connect(backend)
        except RuntimeError as error:
            raise ConnectionError(
                f"the {self.size} processes could not connect ({error})"
            ) from error
        dist.distributed_c10d._set_pg_timeout(WAIT)
        try:
            yield
        except Exception as error:
            failed = isinstance(error, FAILURES)
            if (failed or self.main) and not self._tells(store) and failed:
                raise FailedElsewhere from error
            if isinstance(error, RuntimeError) and is_lost_peer(error):
                raise ConnectionError(
                    f"another process of this job of {self.size} ended before its time"
                ) from error
            raise
        finally:
            dist.destroy_process_group()

    def _tells(self, store: PrefixStore) -> bool:
        """Say whether this process is the one to tell why the job ends: no other one did."""
        if not self.main:
            time.sleep(PRECEDENCE_SECONDS)
        try:
            return bool(store.add("told", 1) == 1)
        except RuntimeError:  # it ended with the process that kept it
            return True

    def _connect(self, backend: str) -> PrefixStore:
        store, rank, size = next(rendezvous("env://", timeout=CONNECT))
        # One store serves every attempt of a job: without names of its own, a process that is
        # started again may find the address that a dead one left there, and knock in vain.
        attempt = PrefixStore(f"attempt {self.restarts}", store)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=CONNECT)
        return attempt

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Say whether the flag is up in any process; every process has to ask."""
        if self.size == 1:
            return flag
        return bool(self.sum_(torch.tensor(int(flag))))

    def take_from_main_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite tensors with those of the main process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def average_(self, tensors: Sequence[Tensor], share: float) -> None:
        """Average tensors over the processes, in place; share: the weight of this one, 1 in all."""
        if self.size > 1 and tensors:
            averages = self.sum_(torch.cat([tensor.flatten() for tensor in tensors]) * share)
            sizes = [tensor.numel() for tensor in tensors]
            for tensor, average in zip(tensors, averages.split(sizes), strict=True):
                tensor.copy_(average.view_as(tensor))

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> Tensor:
        """Put the rows [b, ...] of all processes, sizes[rank] each, one below the other.

        Gradients flow into the rows of this process alone: where each process computes the same
        function of all rows, the sum of their parameter gradients is the gradient of one.
        """
        if self.size == 1:
            return rows
        first = sum(sizes[: self.rank])
        everything = rows.new_zeros(sum(sizes), *rows.shape[1:])
        everything[first : first + len(rows)] = rows.detach()
        self.sum_(everything)
        return torch.cat([everything[:first], rows, everything[first + len(rows) :]])


def split(total: int, parts: int) -> list[int]:
    """Divide `total` rows over parts whose sizes differ by at most one, the larger ones first."""
    return [total // parts + (part < total % parts) for part in range(parts)]


def is_lost_peer(error: RuntimeError) -> bool:
    """Say whether a collective failed because another process is gone."""
    signs = ("connection closed", "connection reset", "broken pipe", "remote process exited")
    text = str(error).lower()
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


class SharedGradients:
    """One buffer behind the gradients of all parameters, with room for statistics behind them.

    parameters: their grad becomes a view of the buffer and has to stay it: zero it in place.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], statistics: int, world: World) -> None:
        self._world = world
        numbers = sum(parameter.numel() for parameter in parameters)
        self._buffer = parameters[0].detach().new_zeros(numbers + statistics)
        self._statistics = self._buffer[numbers:]
        first = 0
        for parameter in parameters:
            # The parameter's own strides: an optimiser that is fused walks both in memory order.
            place = self._buffer[first : first + parameter.numel()]
            parameter.grad = place.as_strided(
                parameter.shape, parameter.stride(), place.storage_offset()
            )
            first += parameter.numel()

    def sum_(self, statistics: Tensor | None = None) -> Tensor:
        """Sum gradients and statistics over the processes; returns the statistics [S].

        The statistics are exact as long as each sum is below 2^24, as counts of images are.
        """
        if statistics is not None:
            self._statistics.copy_(statistics)
        self._world.sum_(self._buffer)
        return self._statistics.clone()

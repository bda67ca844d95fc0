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

        The statistics are exact as long as each sum is below 2^24, as counts in a batch are.
        """
        if statistics is not None:
            self._statistics.copy_(statistics)
        self._world.sum_(self._buffer)
        return self._statistics.clone()


class SyncedBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d that in train mode normalises by the statistics of all processes' batches."""

    world: World

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        output: Tensor
        output, mean, variance, number = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.running_mean, self.eps, self.world
        )
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (number / (number - 1).clamp_min(1)), self.momentum)
        return output


def synchronise_batchnorm_(model: nn.Module, world: World) -> None:
    """Make every BatchNorm2d of a network use the whole batch; parameters and names stay.

    Errors: ValueError for other kinds of BatchNorm.
    """
    for name, module in model.named_modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncedBatchNorm
            setattr(module, "world", world)  # noqa: B010  # the checker still sees a BatchNorm2d
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"--sync-batchnorm: cannot take {type(module).__name__} ({name}); "
                "go on with --no-sync-batchnorm"
            )


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Return the running means and variances of every BatchNorm of a network."""
    kinds = nn.modules.batchnorm._BatchNorm
    norms = [module for module in model.modules() if isinstance(module, kinds)]
    found = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    return [tensor for tensor in found if tensor is not None]


class _Normalise(torch.autograd.Function):
    """Normalise by statistics over all processes; the backward sums over them too."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor,
        eps: float,
        world: World,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Sums of x and x^2 round the running mean, which all processes share: one collective, and
        # none of the cancellation that sums round zero would have.
        centred = x.to(weight.dtype) - _per_channel(shift)
        number = centred.new_full((1,), x.numel() // max(x.shape[1], 1))
        sums = [centred.sum((0, 2, 3)), centred.square().sum((0, 2, 3)), number]
        first, second, number = world.sum_(torch.cat(sums)).split([x.shape[1], x.shape[1], 1])
        mean = first / number
        variance = (second / number - mean.square()).clamp_min(0)
        inverse = (variance + eps).rsqrt()
        normal = (centred - _per_channel(mean)) * _per_channel(inverse)
        ctx.save_for_backward(normal, weight, inverse, number)
        ctx.world = world  # type: ignore[attr-defined]
        output = (normal * _per_channel(weight) + _per_channel(bias)).to(x.dtype)
        results = output, mean + shift, variance, number
        ctx.mark_non_differentiable(*results[1:])
        return results

    @staticmethod
    def backward(ctx, gradient: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
        normal, weight, inverse, number = ctx.saved_tensors
        own = gradient.to(weight.dtype)
        of_bias, of_weight = own.sum((0, 2, 3)), (own * normal).sum((0, 2, 3))
        shared = ctx.world.sum_(torch.cat([of_bias, of_weight])) / number
        mean, projection = (_per_channel(t) for t in shared.chunk(2))
        of_x = (own - mean - normal * projection) * _per_channel(weight * inverse)
        return of_x.to(gradient.dtype), of_weight, of_bias, None, None, None


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)

"""Run a Gluon kernel on CPU tensors: what it asks of Hopper's copies, barriers and products.

Copies and products take effect at any time between the call and the wait for them. Here that is the
earliest or the latest, as a test chooses: a kernel that reads what has not come, or sends for what
overwrites something still to be read, gets a wrong result with one of the four choices. A barrier
that would never open, a copy too many, and memory outside an allocation raise AssertionError.
Layouts say where elements lie, and are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


@dataclass
class Memory:
    """A part of an allocation of a program, in steps through it."""

    hopper: Hopper
    data: Tensor
    offset: int
    shape: list[int]
    strides: list[int]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def values(self) -> Tensor:
        return self.data.as_strided(self.shape, self.strides, self.offset)

    def index(self, k: int) -> Memory:
        assert 0 <= k < self.shape[0]
        offset = self.offset + k * self.strides[0]
        return replace(self, offset=offset, shape=self.shape[1:], strides=self.strides[1:])

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Memory:
        assert dtype == self.data.dtype and self.strides == _strides(self.shape)
        assert self.offset + torch.Size(shape).numel() <= self.data.numel()
        return replace(self, shape=list(shape), strides=_strides(shape))

    def reshape(self, shape: Sequence[int]) -> Memory:
        assert torch.Size(shape).numel() == torch.Size(self.shape).numel()
        return self._reinterpret(self.data.dtype, shape, None)

    def permute(self, order: Sequence[int]) -> Memory:
        shape, strides = ([given[k] for k in order] for given in (self.shape, self.strides))
        return replace(self, shape=shape, strides=strides)

    def load(self, layout: object) -> Tensor:
        return self.values.clone()

    def store(self, values: Tensor) -> None:
        assert values.dtype == self.data.dtype
        self.values.copy_(values)
        self.hopper.unseen = True


@dataclass
class Pointer:
    """A tensor in global memory that is read element by element."""

    base: Tensor
    places: Tensor | None = None

    def __add__(self, places: Tensor) -> Pointer:
        return Pointer(self.base, places)

    def load(self, mask: Tensor, other: float) -> Tensor:
        assert self.places is not None
        found = torch.full(self.places.shape, other, dtype=self.base.dtype)
        found[mask] = self.base[self.places[mask]]
        return found


def _strides(shape: Sequence[int]) -> list[int]:
    return [torch.Size(shape[k + 1 :]).numel() for k in range(len(shape))]


@dataclass
class Descriptor:
    """Boxes of a tensor in global memory; what lies outside it is zero, and is not written."""

    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: object

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def box(self, place: Sequence[int]) -> tuple[Tensor, tuple[slice, ...]]:
        """Return the part of a box that is inside the tensor, and where in the box it is."""
        whole = self.base.as_strided(self.shape, self.strides)
        sizes = zip(place, self.block_shape, self.shape, strict=True)
        bounds = [(at, max(at, 0), min(at + block, size)) for at, block, size in sizes]
        bounds = [(at, first, max(first, last)) for at, first, last in bounds]
        inside = whole[tuple(slice(first, last) for _, first, last in bounds)]
        return inside, tuple(slice(first - at, last - at) for at, first, last in bounds)


@dataclass
class Barrier:
    """Opens when the bytes that it expects have come; then the next phase begins."""

    phase: int = 0
    expected: int | None = None
    arrived: int = 0
    late: list[Callable[[], int]] = field(default_factory=list)

    def count(self, size: int) -> None:
        assert self.expected is not None, "a copy came before its bytes were expected"
        self.arrived += size
        assert self.arrived <= self.expected, "more bytes came than were expected"
        if self.arrived == self.expected:
            self.phase, self.expected, self.arrived = self.phase + 1, None, 0


class Hopper:
    """One program after another, with copies and products that are early or late."""

    def __init__(self, copies: str, products: str) -> None:
        self.copies, self.products = copies, products
        self.program = self.programs = 0

    def run(self, kernel: Callable[..., None], programs: int, *given: Any, **named: Any) -> None:
        """Run all programs of a launch."""
        named.pop("num_warps")
        given = tuple(Pointer(value) if isinstance(value, Tensor) else value for value in given)
        self.programs = programs
        for self.program in range(programs):
            self.barriers: dict[tuple[int, int], Barrier] = {}
            self.queue: list[Callable[[], None]] = []
            self.stores: list[Callable[[], None]] = []
            self.unseen = self.unseen_barriers = False
            kernel(*given, **named)
            assert not self.stores and not self.queue, "the program ended before its work"
            for barrier in self.barriers.values():
                assert barrier.expected is None, "the program ended before a copy had come"

    def language(self) -> SimpleNamespace:
        """Stand in for triton.experimental.gluon.language."""
        return SimpleNamespace(
            constexpr=Any,
            int64=torch.int64,
            float32=torch.float32,
            static_range=range,
            allocate_shared_memory=self.allocate,
            program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs,
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            arange=lambda first, last, layout: torch.arange(first, last),
            load=lambda pointer, mask, other: pointer.load(mask, other),
            expand_dims=torch.unsqueeze,
            where=torch.where,
            NVMMADistributedLayout=lambda **_: None,
            NVMMASharedLayout=lambda **_: None,
            SliceLayout=lambda *_: None,
        )

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Memory:
        """Allocate, filled with NaN."""
        whole = torch.zeros(torch.Size(shape).numel(), dtype=dtype)
        if dtype.is_floating_point:
            whole.fill_(torch.nan)
        return Memory(self, whole, 0, list(shape), _strides(shape))

    def fence(self) -> None:
        """Let copies see what was stored, barriers too."""
        self.unseen = self.unseen_barriers = False

    def barrier(self, memory: Memory) -> Barrier:
        return self.barriers[id(memory.data), memory.offset]

    def init(self, memory: Memory, count: int) -> None:
        assert count == 1
        self.unseen_barriers = True
        self.barriers[id(memory.data), memory.offset] = Barrier()

    def expect(self, memory: Memory, size: int, pred: bool = True) -> None:
        if pred:
            barrier = self.barrier(memory)
            assert barrier.expected is None, "bytes were expected twice in a phase"
            barrier.expected = size

    def wait(self, memory: Memory, phase: int) -> None:
        barrier = self.barrier(memory)
        if barrier.phase % 2 != phase:
            return
        late, barrier.late = barrier.late, []
        for copy in late:
            barrier.count(copy())
        assert barrier.phase % 2 != phase, "a barrier that never opens"

    def copy_in(
        self, desc: Descriptor, place: Any, memory: Memory, to: Memory, pred: bool = True
    ) -> None:
        if not pred:
            return
        assert to.shape == desc.block_shape and not self.unseen_barriers, "a fence is missing"

        def copy() -> int:
            inside, where = desc.box(place)
            to.values.zero_()
            to.values[where] = inside
            return to.values.numel() * to.data.itemsize

        barrier = self.barrier(memory)
        if self.copies == "early":
            barrier.count(copy())
        else:
            barrier.late.append(copy)

    def copy_out(self, desc: Descriptor, place: Any, memory: Memory) -> None:
        assert memory.shape == desc.block_shape and not self.unseen, "a fence is missing"

        def copy() -> None:
            inside, where = desc.box(place)
            inside.copy_(memory.values[where])

        self.stores.append(copy)
        if self.copies == "early":
            copy()

    def store_wait(self, left: int) -> None:
        assert left == 0
        if self.copies == "late":
            for copy in self.stores:
                copy()
        self.stores.clear()

    def multiply(self, a: Memory, b: Memory, sums: Tensor, is_async: bool) -> Tensor:
        assert is_async

        def product() -> None:
            sums.add_(a.values.float() @ b.values.float())

        self.queue.append(product)
        if self.products == "early":
            product()
            self.queue[-1] = lambda: None
        return sums

    def multiplied(self, num_outstanding: int, deps: tuple[Tensor]) -> Tensor:
        while len(self.queue) > num_outstanding:
            self.queue.pop(0)()
        return deps[0]


@dataclass
class Kernel:
    """A function of kernels: called by one, or launched."""

    function: Callable[..., Any]
    hopper: Hopper

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.function(*given, **named)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self.hopper.run, self.function, *grid)


def emulate(
    patch: pytest.MonkeyPatch, module: ModuleType, hopper: Hopper, kernels: Sequence[str]
) -> None:
    """Let the kernels of a module run on CPU tensors."""
    for name in kernels:
        kernel = getattr(module, name)
        patch.setattr(module, name, Kernel(getattr(kernel, "fn", kernel), hopper))
    mbarrier = SimpleNamespace(
        init=hopper.init,
        expect=hopper.expect,
        wait=hopper.wait,
        MBarrierLayout=lambda: None,
    )
    tma = SimpleNamespace(
        async_copy_global_to_shared=hopper.copy_in,
        async_copy_shared_to_global=hopper.copy_out,
        store_wait=hopper.store_wait,
    )
    patch.setattr(module, "gl", hopper.language())
    for name, stand_in in (
        ("mbarrier", mbarrier),
        ("tma", tma),
        ("fence_async_shared", hopper.fence),
        ("warpgroup_mma", hopper.multiply),
        ("warpgroup_mma_wait", hopper.multiplied),
        ("TensorDescriptor", Descriptor),
    ):
        patch.setattr(module, name, stand_in, raising=False)

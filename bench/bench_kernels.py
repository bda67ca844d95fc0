"""Each kernel against the PyTorch form, torch.compile of it, and the device's copy bandwidth.

    pytest bench/bench_kernels.py --benchmark-only --keep

Needs a CUDA device. Times are of CUDA graphs of one call, so that no launch from the host is in
them; the share is bytes that must move over time, against a copy measured in the same run. --keep
appends each row to bench/results as it becomes known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from bench.records import Figure, record
from bench.timing import device_seconds, recorded
from reat_fast.engine.augment import _choices, _policy
from reat_fast.kernels.affine_relu import affine_relu, affine_relu_linked
from reat_fast.kernels.batchnorm import fused_batchnorm
from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.l2 import l2_step_
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.policy import run_policy
from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.kernels.prepare import prepare
from reat_fast.kernels.tail_penalty import tail_penalty
from reat_fast.kernels.triton_support import Backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

COMPARED: tuple[str, ...] = ("triton", "torch", "compiled")
ROUNDS, CALLS = 15, 20
COMMAND = "pytest bench/bench_kernels.py --benchmark-only --keep"


@dataclass(frozen=True)
class Case:
    """One op on one shape: the call, and the bytes it cannot avoid reading and writing."""

    name: str
    make: Callable[[], tuple[Callable[[Backend], object], int]]
    compared: tuple[str, ...] = COMPARED


def _prepare_case(batch: int) -> Case:
    def make() -> tuple[Callable[[Backend], object], int]:
        images = torch.randint(0, 256, (14000, 32, 32, 3), dtype=torch.uint8, device="cuda")
        indices = torch.randint(0, 14000, (batch,), device="cuda")
        seed, epoch = torch.zeros(2, dtype=torch.int64, device="cuda")
        eps = torch.tensor(8 / 255, device="cuda")
        pixels = batch * 32 * 32 * 3
        return lambda backend: prepare(
            images, indices, seed, epoch, eps, backend=backend
        ), 9 * pixels

    return Case(f"prepare B={batch}", make)


def _policy_case(name: str, batch: int) -> Case:
    def make() -> tuple[Callable[[Backend], object], int]:
        images = torch.randint(0, 256, (14000, 32, 32, 3), dtype=torch.uint8, device="cuda")
        indices = torch.randint(0, 14000, (batch,), device="cuda")
        seed, epoch = torch.zeros(2, dtype=torch.int64, device="cuda")
        choices = _choices(_policy(name, 2, 8), 32, 32, images.device)
        return lambda backend: run_policy(
            images, indices, seed, epoch, choices, backend=backend
        ), 2 * batch * 32 * 32 * 3

    # torch.compile takes minutes over the PyTorch form.
    return Case(f"{name} B={batch}", make, compared=("triton", "torch"))


def _step_case(name: str, step: Callable[..., None], batch: int, dtype: torch.dtype) -> Case:
    def make() -> tuple[Callable[[Backend], object], int]:
        layout = {"memory_format": torch.channels_last}
        clean = torch.rand(batch, 3, 32, 32, device="cuda").contiguous(**layout)  # type: ignore[call-overload]
        adv, grad = clean.clone(), torch.randn_like(clean).to(dtype)
        size, eps = torch.tensor([2 / 255, 8 / 255], device="cuda")
        count = torch.zeros((), dtype=torch.int64, device="cuda")
        moved = clean.numel() * (12 + grad.element_size())

        def call(backend: Backend) -> None:
            step(adv, grad, clean, size, eps, nonfinite=count, backend=backend)

        return call, moved

    return Case(f"{name} B={batch} {str(dtype)[6:]}", make)


def _class_loss_case(batch: int, classes: int, dtype: torch.dtype) -> Case:
    def make() -> tuple[Callable[[Backend], object], int]:
        logits = torch.randn(batch, classes, device="cuda", dtype=dtype).requires_grad_()
        labels = torch.randint(0, classes, (batch,), device="cuda")
        offsets = torch.rand(classes, device="cuda")
        histogram = torch.zeros(classes, dtype=torch.int64, device="cuda")

        def call(backend: Backend) -> object:
            loss = class_loss(logits, labels, offsets=offsets, histogram=histogram, backend=backend)
            return torch.autograd.grad(loss, logits)

        return call, logits.numel() * 2 * logits.element_size()

    return Case(f"class_loss B={batch} C={classes} {str(dtype)[6:]}", make)


def _affine_relu_case(batch: int, channels: int, size: int, linked: bool) -> Case:
    """Time sum, BatchNorm and ReLU of a pre-activation block; linked: with the sum's gradient.

    PyTorch's side is its own operators on the whole, as a network has them without the op.
    """

    def make() -> tuple[Callable[[Backend], object], int]:
        made = torch.randn(4, batch, size, size, channels, device="cuda", dtype=torch.bfloat16)
        x, added, grad, other = made.permute(0, 1, 4, 2, 3)
        scale, shift = torch.rand(2, channels, device="cuda")
        zeros, ones = torch.zeros_like(scale), torch.ones_like(scale)
        inputs = [x.requires_grad_(), added.requires_grad_()]

        def call(backend: Backend) -> object:
            if backend == "torch":
                total = x + added
                output = F.relu(F.batch_norm(total, zeros, ones, scale, shift))
            elif linked:
                output, total = affine_relu_linked(x, scale, shift, added, backend=backend)
            else:
                output = affine_relu(x, scale, shift, added, backend=backend)
            if linked:
                return torch.autograd.grad((output, total), inputs, (grad, other))
            return torch.autograd.grad(output, inputs, grad)

        # Two read, one or two written; gradients and the mask read, one gradient written.
        return call, x.numel() * 2 * (6 + 2 * linked)

    form = "affine_relu" + ", linked" * linked
    name = f"{form} B={batch} C={channels} {size}x{size}"
    return Case(name, make, compared=("triton", "torch"))


def _pooled_linear_case(batch: int, width: int, side: int, classes: int) -> Case:
    def make() -> tuple[Callable[[Backend], object], int]:
        maps = torch.randn(batch, width, side, side, device="cuda", dtype=torch.bfloat16).relu()
        maps = maps.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight = torch.randn(classes, width, device="cuda", dtype=torch.bfloat16)
        bias, grad = weight[:, 0].clone(), weight.new_ones(batch, classes)

        def call(backend: Backend) -> object:
            logits = pooled_linear(maps, weight, bias, masks_input=True, backend=backend)
            return torch.autograd.grad(logits, maps, grad)

        # Maps are read for the average and for the mask, and their gradient is written.
        return call, maps.numel() * 3 * maps.element_size()

    # torch.compile keeps an autograd.Function's own backward: nothing would be compared.
    name = f"pooled_linear B={batch} C={width} {side}x{side} K={classes}"
    return Case(name, make, compared=("triton", "torch"))


def _tail_case(batch: int, width: int, form: Any) -> Case:
    def make() -> tuple[Callable[[Backend], object], int]:
        features = torch.randn(batch, width, device="cuda").requires_grad_()
        labels = torch.randint(0, 10, (batch,), device="cuda")
        counts = torch.linspace(5000, 100, 10, device="cuda").long()

        def call(backend: Backend) -> object:
            penalty = tail_penalty(features, labels, counts, form=form, backend=backend)
            return torch.autograd.grad(penalty, features)

        return call, features.numel() * 8

    return Case(f"tail_penalty {form} B={batch} D={width}", make)


def _batchnorm_case(batch: int, channels: int, size: int, residual: bool, relu: bool) -> Case:
    def make() -> tuple[Callable[[Backend], object], int]:
        made = torch.randn(3, batch, size, size, channels, device="cuda", dtype=torch.bfloat16)
        x, added, gradient = made.permute(0, 1, 4, 2, 3)
        summed = added.requires_grad_() if residual else None
        weight, bias = torch.rand(2, channels, device="cuda").requires_grad_()
        mean, variance = torch.rand(2, channels, device="cuda")
        batches = torch.tensor(0, device="cuda")
        inputs = [x.requires_grad_(), weight, bias, *([added] if residual else [])]

        def call(backend: Backend) -> object:
            statistics = (mean, variance, batches, 0.1, 1e-5)
            output = fused_batchnorm(x, weight, bias, *statistics, summed, relu, backend=backend)
            return torch.autograd.grad(output, inputs, gradient)

        # Once each: x and the output forward, gradient, x, the mask and all that is written back.
        return call, x.numel() * 2 * (5 + 3 * residual)

    form = "batchnorm" + ", sum" * residual + ", relu" * relu
    return Case(f"{form} B={batch} C={channels} {size}x{size}", make)


CASES = [
    *(_prepare_case(batch) for batch in (128, 1024, 8192)),  # the last is beyond the L2 cache
    *(_policy_case("autoaugment", batch) for batch in (128, 1024)),
    *(
        _step_case(name, step, batch, dtype)
        for name, step in (("linf_step", linf_step_), ("l2_step", l2_step_))
        for batch in (128, 1024)
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(_step_case("linf_step", linf_step_, 8192, d) for d in (torch.float32, torch.bfloat16)),
    *(
        _batchnorm_case(128, channels, size, residual, True)
        for channels, size in ((64, 32), (128, 16), (256, 8), (512, 4))
        for residual in (False, True)
    ),
    _batchnorm_case(128, 128, 16, False, False),
    *(
        _affine_relu_case(128, channels, size, linked)
        for channels, size in ((160, 32), (320, 16), (640, 8), (64, 32))
        for linked in (False, True)
    ),
    *(_class_loss_case(*shape, torch.float32) for shape in ((128, 10), (1024, 100), (1024, 1000))),
    *(
        _pooled_linear_case(*shape)
        for shape in (
            (128, 512, 4, 10),
            (1024, 512, 4, 10),
            (128, 640, 8, 10),
            (128, 512, 4, 100),
            (128, 512, 4, 200),
        )
    ),
    *(
        _tail_case(*shape, form)
        for shape in ((128, 512), (1024, 640))
        for form in ("official", "pairwise")
    ),
]


@pytest.fixture(scope="module")
def copy_bandwidth() -> float:
    """Bytes a second of a large copy, read and write counted, the best of several."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    seconds = [device_seconds(lambda: target.copy_(source)) for _ in range(5)]
    return 2 * source.numel() / min(seconds)


@pytest.mark.parametrize(
    ("case", "how"),
    [
        pytest.param(case, how, id=f"{how}-{case.name}")
        for how in COMPARED
        for case in CASES
        if how in case.compared
    ],
)
def test_op(
    benchmark: Any, case: Case, how: str, copy_bandwidth: float, pytestconfig: pytest.Config
) -> None:
    call, moved = case.make()
    body = _body(call, how)
    graph = recorded(body)  # warm-up, compilation included, comes before and is not in the times
    seconds: list[float] = []
    benchmark.group = case.name
    benchmark.pedantic(
        lambda: seconds.append(device_seconds(graph.replay, CALLS)), rounds=ROUNDS, warmup_rounds=3
    )
    moves = f"{moved / 1e6:.2f} MB at least, copies at {copy_bandwidth / 1e9:.0f} GB/s"
    figure = Figure.of(f"kernel: {case.name}, {how}", seconds[3:], "s", moves, "")
    if pytestconfig.getoption("keep"):
        record([figure], "cuda", COMMAND)
    benchmark.extra_info |= {
        "median_microseconds": round(figure.value * 1e6, 3),
        "spread_microseconds": round(figure.spread * 1e6, 3),
        "gigabytes_per_second": round(moved / figure.value / 1e9, 1),
        "share_of_copy": round(moved / figure.value / copy_bandwidth, 4),
        "device": torch.cuda.get_device_name(),
    }


def _body(call: Callable[[Backend], object], how: str) -> Callable[[], object]:
    if how == "compiled":
        # One piece of code serves all cases: what was compiled of it for earlier shapes would make
        # this one dynamic, and in the end reach the limit of recompilations.
        torch.compiler.reset()
        compiled: Callable[[], object] = torch.compile(lambda: call("torch"), dynamic=False)
        return compiled
    backend: Backend = "triton" if how == "triton" else "torch"
    return lambda: call(backend)

"""How long a call takes, to the end of what it gave the device to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

from reat_fast.engine.graph import record, warm_up

Returned = TypeVar("Returned")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a call."""
    return timed(call, device)[0]


def timed(call: Callable[[], Returned], device: torch.device) -> tuple[float, Returned]:
    """Return the seconds of a call, and what it returned."""
    wait(device)
    began = time.perf_counter()
    returned = call()
    wait(device)
    return time.perf_counter() - began, returned


def timed_calls(
    call: Callable[[], object], device: torch.device, calls: int, repeats: int
) -> list[float]:
    """Return the seconds of a call, as often as it is repeated; warm-up comes before.

    On a GPU so many calls are replayed from a graph: cuDNN chooses its kernels in single ones.
    """

    def several() -> None:
        for _ in range(calls):
            call()

    if device.type == "cpu":
        call()
        return [seconds(several, device) / calls for _ in range(repeats)]
    graph = recorded(several, call)
    # The first replays bring the graph to the device.
    found = [device_seconds(graph.replay) / calls for _ in range(repeats + 2)]
    return found[2:]


def recorded(
    body: Callable[[], object], first: Callable[[], object] | None = None
) -> torch.cuda.CUDAGraph:
    """Capture a body as a CUDA graph; first: what warms up in its place."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    warm_up(first or body, stream)
    record(graph, body, stream)
    return graph


def device_seconds(call: Callable[[], object], calls: int = 1) -> float:
    """Time calls by events of the device; returns the seconds of one."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def matrix_rate(device: torch.device) -> float:
    """Measure this machine's matrix product in FLOP/s: bf16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (3072, torch.float32)
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    return 2.0 * float(size) ** 3 / min(seconds(lambda: a @ b, device) for _ in range(6))


def wait(device: torch.device) -> None:
    """Wait until a device has done all that it was given; a CPU has by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

"""How long a call takes, to the end of what it gave the device to do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch

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


def matrix_rate(device: torch.device) -> float:
    """Measure this machine's matrix product in FLOP/s: bf16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (3072, torch.float32)
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    return 2.0 * float(size) ** 3 / min(seconds(lambda: a @ b, device) for _ in range(6))


def wait(device: torch.device) -> None:
    """Wait until a device has done all that it was given; a CPU has by itself."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

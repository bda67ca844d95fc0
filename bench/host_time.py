"""What a step costs the host: the time until a call returns, and how often it waits."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch

WARNED = "synchronizing CUDA operation"
"""What PyTorch says of a call that makes the host wait."""


def host_seconds(step: Callable[[], object], repeats: int = 20) -> list[float]:
    """Time how long calls take to return while the device has nothing to do yet."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return seconds


def host_waits(step: Callable[[], object]) -> int:
    """Count the operations of one call that make the host wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(WARNED in str(warning.message) for warning in said)

"""Memory of the process: what a step frees stays with it, and how much it ever took."""

from __future__ import annotations

import ctypes
import sys

import torch

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks; returns whether it was told so.

    A step on a CPU frees hundreds of large maps and takes them again. By default each goes back to
    the system, which clears every page anew: about a quarter of a ResNet-18 step.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were ever reserved on a GPU, or resident in a process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak

"""Memory that a step frees stays with the process, so that the next step need not ask again."""

from __future__ import annotations

import ctypes
import sys

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

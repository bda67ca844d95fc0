"""Memory of the process: keeping what steps free, the peak, sheltering from a fault of PyTorch."""

from __future__ import annotations

import ctypes
import sys

import torch
from torch import Tensor, nn

# Names and numbers of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4

REGISTER = 16
"""float32 numbers in the widest register of a CPU."""


def keep_freed_memory() -> bool:
    """Let glibc keep large freed blocks; returns whether it was told so.

    A step on a CPU frees hundreds of large maps and takes them again. By default each goes back to
    the system, which clears every page anew: about a quarter of a ResNet-18 step.
    """
    return _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> bool:
    """Let glibc do as it does by itself; returns whether it was told so. For comparisons.

    By itself it raises its threshold to the largest block of at most 32 MiB that was freed, and
    gives larger ones back; once told anything it no longer does, so that state is set here.
    """
    threshold = 2**25
    values = {M_MMAP_MAX: 2**16, M_MMAP_THRESHOLD: threshold, M_TRIM_THRESHOLD: 2 * threshold}
    return _mallopt(values)


def shelter_thin_convolutions_(network: nn.Module) -> list[nn.Conv2d]:
    """Let a network be trained on a CPU in channels_last without damage; return what it takes.

    oneDNN, as PyTorch 2.13 has it, writes past the end of the weight gradient of a strided 1x1
    convolution in channels_last with fewer channels than fit a register (8 or 16, by the CPU): the
    process ends without a word, now or later (github.com/uxlfoundation/oneDNN/issues/6035). Such
    a one gets images and weights in the other layout, which is computed rightly. To be called once
    the network has its layout.
    """
    thin = [
        module
        for module in network.modules()
        if isinstance(module, nn.Conv2d)
        and module.in_channels < REGISTER
        and module.kernel_size == (1, 1) != module.stride
        and _contiguous not in module._forward_pre_hooks.values()  # sheltered before
    ]
    for conv in thin:
        # Where height and width are 1 both layouts are contiguous; strides tell which is meant.
        weight = conv.weight.data
        conv.weight.data = torch.empty(weight.shape, dtype=weight.dtype).copy_(weight)
        conv.register_forward_pre_hook(_contiguous)
    return thin


def _contiguous(conv: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)


def _mallopt(values: dict[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all([mallopt(name, value) for name, value in values.items()])


def forget_peak_memory(device: torch.device) -> None:
    """Give a GPU's unused memory back and count its peak from here on; elsewhere do nothing."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


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

"""Triton where it is installed, stand-ins where it is not, and the choice of kernel or PyTorch.

Every kernel file takes `jit`, `tl` and `wrap_triton` from here, so that importing one needs
neither a GPU nor Triton. `TRITON_INTERPRET=1`, set before Python starts, runs kernels on CPU
tensors (slowly, for tests).
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

triton: Any
tl: Any
TensorDescriptor: Any
try:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore, no-redef]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore, no-redef]

    TRITON_INSTALLED = True
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=lambda value: value)
    TRITON_INSTALLED = False
    # torch warns about every op that it finds no kernels for: ours have a PyTorch form.
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)

try:
    # Boxes of a tensor that the hardware fetches by itself.
    from triton.tools.tensor_descriptor import TensorDescriptor  # type: ignore[import-untyped, import-not-found, unused-ignore, no-redef]
except ImportError:
    TensorDescriptor = None


ENDING = [number for number in signal.Signals if number.name in ("SIGHUP", "SIGINT", "SIGTERM")]
"""Signals that ask a program to end, of which Windows lacks one."""


def _take_signals_back(*loaded: object) -> None:
    """Put the signal handlers of this program in place again, after a kernel was compiled.

    The first time LLVM compiles it puts handlers of its own there, which pass on what they get. But
    a signal that comes twice at once, as from timeout(1), then ends the program on the spot.
    """
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            handler = signal.getsignal(number)
            if handler is not None:  # None: one that Python does not know
                signal.signal(number, handler)


# Called when a kernel is loaded, right after it was compiled; old versions have no such list.
_settings: Any = getattr(getattr(triton, "knobs", None), "runtime", None)
if hasattr(getattr(_settings, "kernel_load_end_hook", None), "add"):
    _settings.kernel_load_end_hook.add(_take_signals_back)

INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def jit(kernel: Callable[..., Any]) -> Any:
    """Make a kernel, as `triton.jit` does; without Triton the function stays as it is, unused."""
    return triton.jit(kernel) if TRITON_INSTALLED else kernel


def wrap_triton(kernel: Any) -> Any:
    """Make a launch in a `triton_op` visible to `torch.compile`; an interpreted kernel stays as is.

    Elsewhere kernels are launched as they are: outside of an op PyTorch keeps what each launch
    gives, a new kernel where that is a number of warps, and so a process grows and waits.
    """
    return kernel if INTERPRETED else torch.library.wrap_triton(kernel)


def kernel_runs_on(tensor: Tensor) -> bool:
    """Say whether a kernel can be launched on this tensor; the body of a `triton_op` asks this."""
    return TRITON_INSTALLED and (tensor.device.type == "cuda" or INTERPRETED)


def use_triton(backend: Backend, tensor: Tensor) -> bool:
    """Choose between the Triton kernel and the PyTorch form of an op.

    `auto` is Triton on tensors of the current CUDA device where it is installed, else PyTorch;
    `triton` on a CPU tensor needs TRITON_INTERPRET=1. Raises ValueError for an unknown backend, and
    where no kernel can run.
    """
    if backend == "torch":
        return False
    if backend == "auto":
        return tensor.device.type == "cuda" and TRITON_INSTALLED and is_current(tensor.device)
    if backend != "triton":
        raise ValueError(f"backend={backend!r} is unknown: give 'auto', 'torch' or 'triton'")
    if not TRITON_INSTALLED:
        raise ValueError(
            "backend='triton' needs Triton: pip install triton (Linux), or give backend='torch'"
        )
    if not kernel_runs_on(tensor):
        raise ValueError(
            f"backend='triton' cannot run on {tensor.device.type} tensors: give backend='torch', "
            "or set TRITON_INTERPRET=1 before Python starts to run kernels in Triton's interpreter"
        )
    if not is_current(tensor.device):
        raise ValueError(
            f"backend='triton': tensors on {tensor.device}, where Triton launches on the current "
            f"device: call torch.cuda.set_device({tensor.device.index}) first"
        )
    return True


def is_current(device: torch.device) -> bool:
    """Say whether Triton launches on a device: on one CUDA device at a time, the current one."""
    other = device.type == "cuda" and device.index is not None
    return not other or device.index == torch.cuda.current_device()


def cdiv(size: int, block: int) -> int:
    """Return how many blocks cover a size; triton.cdiv needs Triton."""
    return -(-size // block)


def power_of_two(size: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least a size, as Triton's ranges have to be."""
    return max(least, 1 << (size - 1).bit_length())


def in_loss_precision(values: Tensor) -> Tensor:
    """Return logits or features in float32; those in float64 stay what they are."""
    return values if values.dtype == torch.float64 else values.float()


def device_number(
    value: float | Tensor, like: Tensor, name: str, dtype: torch.dtype | None = None
) -> Tensor:
    """Put a number, or one number per sample, where kernels read it: on the device, with no copy.

    value: Python number, 0-dim tensor or tensor [B]; like: tensor [B, ...] on the wanted device.
    Returns a 0-dim tensor or [B], of `dtype` (default: that of like), which a graph replay rereads
    if the value was a tensor. Raises ValueError for another shape or device.
    """
    dtype = like.dtype if dtype is None else dtype
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=like.device)
    if value.shape not in ((), like.shape[:1]):
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}: give a number or a tensor of shape () or "
            f"({like.shape[0]},), one value per sample"
        )
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, the images on {like.device}: move it there")
    return value.to(dtype).contiguous()  # kernels step from one sample to the next by one

"""In which arithmetic the network computes: float32, TF32 or bfloat16."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from reat_fast.config import Config

Precision = Literal["float32", "tf32", "bf16"]

BFLOAT16_CAPABILITY = (8, 0)
"""The first GPUs for which cuDNN convolves in bfloat16: those of A100 and RTX 30."""


def resolve_precision(config: Config, device: torch.device) -> Precision:
    """Say in which arithmetic the network trains: float32, tf32, which a CPU has not, or bf16.

    Errors: ValueError for bf16 on a GPU that has none.
    """
    if config.precision == "auto":
        quick = device.type == "cuda" and config.fused and has_bfloat16(device)
        return "bf16" if quick else "float32"
    if config.precision == "bf16":
        refuse_missing_bfloat16(device)
    if config.precision == "tf32" and device.type == "cpu":
        return "float32"
    return config.precision


def low_dtype(precision: Precision) -> torch.dtype | None:
    """Return the dtype of fewer bits than weights have in which a network computes, if in one."""
    return torch.bfloat16 if precision == "bf16" else None


def has_bfloat16(device: torch.device) -> bool:
    """Say whether networks can compute in bfloat16 on a device."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY


def refuse_missing_bfloat16(device: torch.device) -> None:
    """Raise ValueError where networks cannot compute in bfloat16."""
    if not has_bfloat16(device):
        raise ValueError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not convolve in "
            "bfloat16; give --precision float32"
        )


def use_precision(config: Config, device: torch.device) -> None:
    """Allow TF32 or forbid it, as the configuration says, and let cuDNN choose by measuring.

    A bfloat16 run allows TF32 for what stays in float32. With --deterministic only algorithms are
    allowed whose results do not depend on the order in which threads finish.
    """
    _allow_tf32(resolve_precision(config, device) != "float32")
    _choose_algorithms(config.deterministic)


@contextmanager
def full_precision() -> Iterator[None]:
    """Forbid TF32 inside the block: figures and parity are those of true float32."""
    with allowed_tf32(False):
        yield


@contextmanager
def allowed_tf32(allowed: bool) -> Iterator[None]:
    """Allow TF32 inside the block, or forbid it."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    _allow_tf32(allowed)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def determinism() -> Iterator[None]:
    """Use only algorithms that give the same bits each time inside the block."""
    benchmark = torch.backends.cudnn.benchmark
    before = torch.are_deterministic_algorithms_enabled()
    _choose_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cuda.matmul.allow_tf32 = allowed


def _choose_algorithms(deterministic: bool) -> None:
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        # Nothing here reads memory before it is written, so none need be filled each time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # cuBLAS reads this when it starts; without it its products on several streams may differ.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

"""What kernels of maps [B, C, H, W] share: memory with channels last, and numbers per channel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of maps that kernels take whose other arguments are float32."""


def empty_channels_last(
    shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Return memory for maps of a shape, channels last, on the device and of the dtype of like."""
    return torch.empty(
        shape, dtype=dtype or like.dtype, device=like.device, memory_format=torch.channels_last
    )


def are_per_channel(x: Tensor, *values: Tensor) -> bool:
    """Say whether each of the values is a float32 number for each channel of x, beside it."""
    return all(
        each.dtype == torch.float32
        and each.shape == x.shape[1:2]
        and each.device == x.device
        and each.is_contiguous()
        for each in values
    )

"""How many images are attacked at once: it changes no figure, but how long a device waits."""

from __future__ import annotations

import math

import torch
from torch import nn

from reat_fast.engine.graph import can_capture
from reat_fast.engine.memory import forget_peak_memory
from reat_fast.engine.precision import Precision
from reat_fast.evaluation.passes import filled_up
from reat_fast.evaluation.victim import attacked

USUAL = 500
"""On a CPU, and where no attack is asked for."""
MOST = 4096
"""More images at once keep no GPU busier."""
LEAST = 16
PROBED = 256
"""Images whose gradient is taken to see how much memory one needs."""
SHARE = 0.3
"""Of the free memory, for one pass with gradient: a search keeps a dozen images more for each, and
graphs keep the maps of a pass of their own."""


def even(images: int, most: int) -> int:
    """Return the size of as few batches as hold so many images, all as large but for the last."""
    return math.ceil(images / max(math.ceil(images / most), 1))


def fitting(model: nn.Module, size: tuple[int, int, int], precision: Precision) -> int:
    """Return how many images [C, H, W] of a size are best attacked at once on a model's device.

    On a GPU that is what memory allows, measured on a pass with gradient, up to MOST.
    """
    device = next(model.parameters()).device
    if not can_capture(device):
        return USUAL
    images = torch.zeros(PROBED, *size, device=device).to(memory_format=torch.channels_last)
    with attacked(model, precision) as victim:
        images = filled_up(images.to(victim.dtype))
        for _ in range(2):  # the first makes workspaces that stay
            forget_peak_memory(device)
            before = torch.cuda.memory_allocated(device)
            victim.gradient(images, lambda logits: logits.sum(1))
            each = (torch.cuda.max_memory_allocated(device) - before) / len(images)
    forget_peak_memory(device)
    free, _ = torch.cuda.mem_get_info(device)
    return min(max(int(SHARE * free / max(each, 1)), LEAST), MOST)

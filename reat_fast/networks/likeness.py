"""Whether a network that was rewritten still computes what it did.

A trace refuses what it sees that it cannot keep; code of others may do what it does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.engine.precision import full_precision
from reat_fast.networks.frozen import FrozenNetwork


def alike(plain: FrozenNetwork, rewritten: FrozenNetwork, images: Tensor) -> bool:
    """Say whether two networks give images the same logits and gradients, to rounding; syncs.

    images [B, C, H, W]: a few. plain: the network as it is, whose errors are raised.
    """
    both = []
    with full_precision(), torch.enable_grad():
        for network in (plain, rewritten):
            leaf = images.detach().clone().requires_grad_()
            try:
                logits = network(leaf)
            except (AttributeError, RuntimeError):
                if network is plain:
                    raise
                return False  # its own code reads what was rewritten
            signs = (torch.arange(logits.numel(), device=logits.device) % 2 * 2 - 1).view_as(logits)
            given = torch.zeros_like(leaf)
            if logits.requires_grad:
                total = (logits * signs).sum()
                (given,) = torch.autograd.grad(total, leaf, materialize_grads=True)
            both.append((logits.detach(), given))
    (first, gradient), (second, other) = both
    # Far above rounding: where a ReLU is at 0 but for rounding, its gradient comes or goes.
    return bool((first - second).abs().max() <= 1e-3 * first.abs().max()) and bool(
        (gradient - other).norm() <= 0.05 * gradient.norm()
    )

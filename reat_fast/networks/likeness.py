"""Whether a network that was rewritten still computes what it did.

A trace refuses what it sees that it cannot keep; code of others may do what it does not see.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reat_fast.engine.precision import full_precision
from reat_fast.networks.frozen import DEFAULT_FORM, FrozenNetwork, fastest_form


def keeps(network: nn.Module, rewritten: FrozenNetwork, low: bool, images: Tensor) -> bool:
    """Say whether a network is rewritten into one of the same logits and gradients; syncs.

    rewritten: it, as fine as the network. low: whether it is to be searched in 16 bits, too; on a
    GPU a graph then stands in for its own code, and rounding would hide a difference there.
    images [B, C, H, W]: a few. Both are equal to rounding; what the network raises is raised.
    Errors: ValueError for a network whose output is no tensor.
    """
    found = [rewritten]
    if low and fastest_form(torch.bfloat16, images.device) != DEFAULT_FORM:
        found.append(FrozenNetwork(network, None, "cudnn"))
    plain = FrozenNetwork(network, rewritten=False)  # whose weights want no gradient
    return all(_alike(plain, one, images) for one in found)


def _alike(plain: FrozenNetwork, rewritten: FrozenNetwork, images: Tensor) -> bool:
    both = []
    with full_precision(), torch.enable_grad():
        for network in (plain, rewritten):
            leaf = images.detach().clone().requires_grad_()
            try:
                logits = network(leaf)
            except Exception:  # its own code meets what was rewritten: anything can come of it
                if network is plain:
                    raise
                return False
            if not isinstance(logits, Tensor):
                raise ValueError(
                    f"model: gives a {type(logits).__name__}; it has to give logits alone"
                )
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

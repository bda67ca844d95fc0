"""Adversarial weight perturbation: take the gradient where nearby weights are worst.

A step computes the gradient of its loss, moves the weights up along it, computes the gradient
there, updates, and takes the movement back. Each weight tensor moves by gamma of its own norm.
Source: utils_awp.py of AWP (Wu et al., NeurIPS 2020).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from reat_fast.networks.architectures import Network


class WeightPerturbation:
    """Perturb the weights of a network in memory that stays, for steps that are captured.

    gamma: length of the movement over the norm of each tensor; the official code takes 0.01 for
    plain adversarial training, 0.005 for TRADES. As there, what has one dimension (biases,
    BatchNorm) stays, and what is not called a weight (embeddings of places in a transformer).
    """

    def __init__(self, network: Network, gamma: float) -> None:
        if gamma <= 0:
            raise ValueError(f"--awp {gamma:g}: must be above 0; 0.005 and 0.01 are usual")
        self._gamma = gamma
        self._weights: list[Tensor] = [
            tensor
            for name, tensor in network.named_parameters()
            if tensor.ndim > 1 and "weight" in name
        ]
        self._moved = [torch.zeros_like(weight) for weight in self._weights]

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """Move the weights along their gradients for as long as the block runs; may not sync.

        Before: the gradients of the loss, summed over parts and processes, stand in grad. In the
        block: zero them, compute loss and gradients again, update. The update belongs inside, for
        its weight decay is that of the moved weights in the official code.
        """
        weights, moved = self._move_()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_sub_(weights, moved)

    @torch.no_grad()
    def _move_(self) -> tuple[list[Tensor], list[Tensor]]:
        """Move the weights; return those that were, and by how much: they alone are moved back."""
        # A weight that the network does not use has no gradient and stays.
        used = [n for n, weight in enumerate(self._weights) if weight.grad is not None]
        assert used, "the gradient comes before the perturbation"
        weights, moved = ([tensors[n] for n in used] for tensors in (self._weights, self._moved))
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        # As in the official code, where a weight whose gradient is zero must not become NaN.
        lengths = torch._foreach_add(torch._foreach_norm(gradients), 1e-20)
        scales = torch._foreach_div(torch._foreach_norm(weights), lengths)
        torch._foreach_mul_(scales, self._gamma)
        torch._foreach_copy_(moved, torch._foreach_mul(gradients, scales))
        torch._foreach_add_(weights, moved)
        return weights, moved


@contextmanager
def statistics_kept(network: Network) -> Iterator[None]:
    """Give BatchNorm back the running statistics it had before the block; may not sync.

    For the first of the two forwards, which the official code makes on a copy of the network.
    """
    buffers = list(network.buffers())
    kept = [buffer.clone() for buffer in buffers]
    yield
    if buffers:  # a transformer has none
        with torch.no_grad():
            torch._foreach_copy_(buffers, kept)

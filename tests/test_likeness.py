"""A copy is taken for the network only where both its logits and its gradients are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from reat_fast.networks.frozen import FrozenNetwork
from reat_fast.networks.likeness import keeps


class Linear(nn.Module):
    """A linear classifier; one whose gradient is a share of what its logits say."""

    def __init__(self, gradient: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.gradient = nn.Linear(48, 4), gradient

    def forward(self, images: Tensor) -> Tensor:
        logits = self.fc(images.flatten(1))
        return logits.detach() + self.gradient * (logits - logits.detach())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("gradient", "shift", "alike"),
    [(1.0, 0.0, True), (1 + 1e-6, 1e-6, True), (1.0, 0.01, False), (0.5, 0.0, False)],
)
def test_logits_and_gradients_are_both_compared(gradient: float, shift: float, alike: bool) -> None:
    network, other, images = Linear(), Linear(gradient), torch.rand(4, 3, 4, 4)
    with torch.no_grad():
        other.fc.bias += shift * network(images).abs().max()
    assert keeps(network, FrozenNetwork(other, rewritten=False), False, images) == alike

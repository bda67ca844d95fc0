"""An exponential moving average of a network's weights and BatchNorm statistics, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.networks.architectures import Network
from reat_fast.networks.copies import copy_of

PREFIX = "average."
"""Before the name of a tensor whose average a saved state holds."""


class WeightAverage:
    """Follow a network with average <- average + share * (network - average) after each step.

    share is 1 - decay, and larger in the first steps, 9 / (9 + steps), so that the random weights
    of the beginning are soon forgotten. Running means and variances are averaged like weights:
    they are those of the averaged weights to first order, and better than those of the last step.
    """

    def __init__(self, network: Network, decay: float) -> None:
        self._network = network
        self._decay = decay
        state = network.state_dict()
        self._names = [name for name, tensor in state.items() if tensor.is_floating_point()]
        self._source = [state[name] for name in self._names]
        self._average = [tensor.clone() for tensor in self._source]
        self._steps = torch.zeros((), device=self._source[0].device)

    @torch.no_grad()
    def update_(self) -> None:
        """Take up the network as it is now; may not sync."""
        self._steps += 1
        share = (9 / (9 + self._steps)).clamp(min=1 - self._decay)
        away = torch._foreach_sub(self._source, self._average)
        torch._foreach_mul_(away, share)
        torch._foreach_add_(self._average, away)

    def network(self) -> Network:
        """Return a copy of the network with the averaged weights."""
        averaged = copy_of(self._network)
        averaged.load_state_dict(dict(zip(self._names, self._average, strict=True)), strict=False)
        return averaged

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        average = {PREFIX + n: t for n, t in zip(self._names, self._average, strict=True)}
        return {**average, "average_steps": self._steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state, into the same memory."""
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

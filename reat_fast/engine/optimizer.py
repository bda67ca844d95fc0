"""The optimiser of a step: made so that a CUDA graph can hold it, and given back a saved state."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from reat_fast.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.SGD:
    """Make SGD whose learning rate is a tensor on the device, with its momentum in place.

    Both are what a captured step needs: a float would be baked into the graph, and a momentum
    buffer made in the first step would be reset by every replay. Zero momentum equals none yet.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(
        parameters,
        lr=torch.tensor(config.lr, device=parameters[0].device),
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser of make_optimizer a saved state, wherever that lies.

    PyTorch brings momentum to the device of the weights and takes the rest as it is saved, the
    learning rate too: from a file that would be a tensor on the CPU, and a graph would keep the
    number it has when it is captured.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate.fill_(float(group["lr"]))

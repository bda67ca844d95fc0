"""A network, images, noise and objectives that methods are tested on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from reat_fast.config import Config
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.methods.objectives import (
    Objective,
    Part,
    make_objective,
)
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.objective import ClassStatistics

COUNTS = [40, 24, 12, 7, 4]
EPS, STEP = 8 / 255, 2 / 255
# Sums of a few hundred float64 terms in another order, eps 2.2e-16, through eight layers.
EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def make_network(head: str = "linear", dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(0)
    network = create_model("resnet8", 5, width=8).to(dtype)
    if head == "cosine":
        use_cosine_head(network).compensate_(COUNTS, 0.1)
    return network.train()


def make_images(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    images = torch.rand(10, 3, 8, 8, generator=made, dtype=dtype)
    # Some pixels at both ends, where clamping a start or not makes a difference.
    images[:, 0, :2], images[:, 1, :2] = 0.0, 1.0
    return images, torch.arange(10) % 4  # class 4 is absent


def make_noise(images: Tensor, scale: float = EPS, seed: int = 5) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return (torch.rand(images.shape, generator=made, dtype=images.dtype) * 2 - 1) * scale


def make_statistics(dtype: torch.dtype = torch.float64) -> ClassStatistics:
    return ClassStatistics(COUNTS, torch.device("cpu"), dtype)


def make_part(clean: Tensor, adv: Tensor, labels: Tensor, epoch: int = 0, **changes: Any) -> Part:
    histogram = torch.zeros(5, dtype=torch.int64)
    part = Part(clean, adv, labels, len(labels), torch.tensor(epoch), histogram)
    return dataclasses.replace(part, **changes)


def named_objective(case: str, **constants: Any) -> tuple[Objective, Network, int]:
    """Make the objective of a case "name" or "name-epoch", with a network and the epoch."""
    name, _, epoch = case.partition("-")
    network = make_network("cosine" if name == "robal" else "linear")
    config = objective_config(name, **constants)
    return make_objective(network, make_statistics(), config), network, int(epoch or 0)


def objective_config(name: str, tail: str = "none", **constants: Any) -> Config:
    """Make the configuration of an objective; tail: of the one that has a penalty."""
    head = "cosine" if name == "robal" else "linear"
    tail = tail if name == "bsl" else "none"
    return Config(**{"objective": name, "head": head, "tail": tail, **constants})


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def gradients(network: Network) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert found
    return found

"""A small network, batches and noise that steps are tested on."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import torch
from torch import Tensor

from reat_fast.loaders import Batch
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.step import TrainStep


class Trains(Protocol):
    """A step, launched or replayed."""

    def train_on(self, batch: Batch) -> dict[str, Tensor]: ...


COUNTS = [40, 24, 12, 7, 4]


def make_batch(dtype: torch.dtype = torch.float32, size: int = 12) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    images = torch.rand(size, 3, 8, 8, generator=made, dtype=dtype)
    labels = torch.randint(0, 5, (size,), generator=made)
    labels[:2] = 4
    return images, labels


def make_noise(images: Tensor, step: int) -> Tensor:
    made = torch.Generator().manual_seed(100 + step)
    return (torch.rand(images.shape, generator=made, dtype=images.dtype) * 2 - 1) * 8 / 255


def make_model(dtype: torch.dtype = torch.float32, head: str = "linear") -> Network:
    torch.manual_seed(0)
    network = create_model("resnet8", 5, width=8)
    if head == "cosine":
        use_cosine_head(network).compensate_(COUNTS, 0.1)
    return network.to(dtype)


def uint8_batch(gather: bool = True) -> Batch:
    made = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (30, 8, 8, 3), generator=made, dtype=torch.uint8)
    labels = torch.arange(30) % 5
    rows = torch.tensor([3, 29, 4, 14, 9, 0, 7, 1])
    return Batch(images if gather else images[rows], labels[rows], rows, gather=gather)


def batches() -> list[Batch]:
    """Make two whole batches and a short one."""
    whole = uint8_batch()
    second = torch.tensor([20, 21, 22, 23, 24, 25, 26, 27])
    labels = torch.arange(30) % 5
    short = slice(0, 3)
    return [
        whole,
        dataclasses.replace(whole, indices=second, labels=labels[second]),
        dataclasses.replace(whole, indices=second[short], labels=labels[second][short]),
    ]


def assert_same_step(first: Trains, second: Trains, batch: Batch) -> None:
    """Take a step of two on a batch, and hold their outcomes bit for bit."""
    expected, found = first.train_on(batch), second.train_on(batch)
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_same_state(first: TrainStep, second: TrainStep) -> None:
    """Hold everything that two steps change and read again bit for bit."""
    for a, b in zip(first.state_tensors(), second.state_tensors(), strict=True):
        assert torch.equal(a, b)

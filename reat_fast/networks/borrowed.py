"""A network that somebody else owns: where it is; its modes and statistics left as they were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


def first_tensor(model: nn.Module) -> Tensor:
    """Return a tensor that tells a model's device and type.

    Errors: ValueError for what is no module, or one that holds none.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: a {type(model).__name__}; give an nn.Module, pgd takes functions")
    found = next(chain(model.parameters(), model.buffers()), None)
    if found is None:
        raise ValueError(
            "model: has neither parameters nor buffers, which tell its device and type; "
            "register a buffer"
        )
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and give every module back the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def with_batch_statistics(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the network as it is in train mode, without touching its running statistics.

    For attacks on batch statistics: the forward works on copies of the BatchNorm buffers and on
    detached weights. The mode of the model is the caller's business.
    """

    def forward(images: Tensor) -> Tensor:
        frozen = {name: weight.detach() for name, weight in model.named_parameters()}
        copies = {name: buffer.clone() for name, buffer in model.named_buffers()}
        logits: Tensor = torch.func.functional_call(model, {**frozen, **copies}, (images,))
        return logits

    return forward

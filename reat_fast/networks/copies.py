"""A copy of a network that may hold tensors of a graph."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from reat_fast.cli.terminal import first_line

Module = TypeVar("Module", bound=nn.Module)


def copy_of(network: Module) -> Module:
    """Copy a network; tensors of a graph that it keeps, as its last features, are detached.

    Errors: ValueError where it keeps them otherwise than as attributes, and for TorchScript.
    """
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError("model: TorchScript cannot be rewritten; give the module it was made of")
    held = (value for module in network.modules() for value in vars(module).values())
    of_graph = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    try:
        return copy.deepcopy(network, {id(value): value.detach() for value in of_graph})
    except RuntimeError as error:
        reason = first_line(error)
        raise ValueError(
            f"model: {type(network).__name__} cannot be copied ({reason}); detach what it keeps"
        ) from error

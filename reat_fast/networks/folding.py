"""Find, by tracing a network, the BatchNorms behind convolutions, and fold them.

In eval mode BatchNorm is a constant scale and shift per channel. Where it reads a convolution whose
output nothing else reads, both are one convolution.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from reat_fast.networks.tracing import calls, is_one_of, trace

# timm's compute what their PyTorch parents do, with other padding or an activation behind; any
# other subclass may treat its weights in its own way.
_CONVS = ("Conv2d", "Conv2dSame")
_BATCHNORMS = (
    "BatchNorm2d",
    "BatchNormAct2d",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "SyncedBatchNorm",  # of reat_fast.engine.synced_batchnorm
)


@dataclass(frozen=True)
class Fold:
    """A convolution and the BatchNorm behind it; weight and bias of what stands for both."""

    conv: nn.Conv2d
    bn: Any  # a BatchNorm; that its weight and statistics are there is seen to
    weight: Tensor
    bias: Tensor


def fold_batchnorms_(own: nn.Module, source: nn.Module) -> list[Fold]:
    """Take out of a copy in eval mode each BatchNorm that can be folded into a convolution.

    That convolution gets a bias, and an activation that the BatchNorm held stays; the values of
    weight and bias are the caller's. source: the network that `own` is a copy of.
    Returns where the values come from and go to; nothing for a network that cannot be traced.
    """
    folds = []
    for conv_name, bn_name in _find_folds(own):
        conv, target = source.get_submodule(conv_name), own.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d) and isinstance(target, nn.Conv2d)
        if target.bias is None:
            target.bias = nn.Parameter(target.weight.new_zeros(len(target.weight)), False)
        activation = getattr(own.get_submodule(bn_name), "act", nn.Identity())
        own.set_submodule(bn_name, activation)
        folds.append(Fold(conv, source.get_submodule(bn_name), target.weight, target.bias))
    return folds


def _find_folds(network: nn.Module) -> list[tuple[str, str]]:
    """Name each convolution and the BatchNorm that can be folded into it."""
    graph = trace(network)
    if graph is None:
        return []
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {node.target.rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    folds = []
    for node in graph.nodes:
        source: Any = node.args[0] if node.args else None
        if (
            calls(network, node, _is_plain_batchnorm)
            and calls(network, source, _is_plain_conv)
            and len(source.users) == 1
            # A module in two places has one weight for both.
            and uses[source.target] == uses[node.target] == 1
            and read.isdisjoint((source.target, node.target))
            and _owns(network, source.target, node.target)
        ):
            folds.append((source.target, node.target))
    return folds


def _owns(network: nn.Module, *names: str) -> bool:
    """Say whether no other module goes on with the parameters of these."""
    owners = Counter(
        id(parameter) for module in network.modules() for parameter in module._parameters.values()
    )
    return all(
        owners[id(parameter)] == 1
        for name in names
        for parameter in network.get_submodule(name)._parameters.values()
        if parameter is not None
    )


def _is_plain_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and is_one_of(module, _CONVS)


def _is_plain_batchnorm(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or not is_one_of(module, _BATCHNORMS):
        return False
    return module.affine and module.running_mean is not None

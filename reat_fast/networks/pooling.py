"""Find, by tracing a network, the linear layer that reads an average over the pixels, and merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from reat_fast.kernels.pooled_linear import FEW_CLASSES, pooled_linear
from reat_fast.kernels.triton_support import Backend
from reat_fast.networks.tracing import calls, is_one_of

# With the kind of call, as a module may have any name.
_MEANS: tuple[Any, ...] = (("call_method", "mean"), ("call_function", torch.mean))
_FLATTENINGS: tuple[Any, ...] = (("call_method", "flatten"), ("call_function", torch.flatten))


def fuse_poolings(network: nn.Module, graph: fx.Graph, backend: Backend) -> None:
    """Rewrite linear(mean(x)) over the pixels as pooled_linear, which gets the backend."""
    for linear in [node for node in graph.nodes if calls(network, node, _is_small_linear)]:
        _fuse_pooling(network, graph, linear, backend)


def _fuse_pooling(network: nn.Module, graph: fx.Graph, linear: fx.Node, backend: Backend) -> None:
    """Put one pooled_linear in the place of a linear layer and of the average that it alone reads.

    One that averages in two calls, the second of which flattens, is both.
    """
    end: Any = linear.args[0] if linear.args else None
    replaced = [linear, end]
    if _is_flatten(network, end) and len(end.users) == 1:
        end = end.args[0]
        replaced.append(end)
        pooled = calls(network, end, _is_average)
    else:
        pooled = _is_mean(end) or calls(network, end, _is_flat_average)
    if not pooled or len(end.users) != 1:
        return
    module: Any = network.get_submodule(str(linear.target))
    with graph.inserting_before(end):  # the maps may be written to before the linear layer
        weight = graph.get_attr(f"{linear.target}.weight")
        bias = None if module.bias is None else graph.get_attr(f"{linear.target}.bias")
        given = (end.args[0], weight, bias)
        output = graph.call_function(pooled_linear, given, {"backend": backend})
    linear.replace_all_uses_with(output)
    for node in replaced:
        graph.erase_node(node)


def _is_small_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and module.out_features <= FEW_CLASSES


def _is_mean(node: Any) -> bool:
    """Say whether a node is mean((2, 3)), however that is written."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if (node.op, node.target) not in _MEANS:
        return False
    named = dict(node.kwargs)
    if len(node.args) == 1:
        dims: Any = named.pop("dim", None)
    else:
        dims = node.args[1]
    plain = len(node.args) <= 2 and named in ({}, {"keepdim": False})
    return plain and isinstance(dims, (tuple, list)) and tuple(dims) == (2, 3)


def _is_average(module: nn.Module) -> bool:
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1))


def _is_flat_average(module: Any) -> bool:
    if not is_one_of(module, ("SelectAdaptivePool2d",)) or not _is_average(module.pool):
        return False
    return _flattens(module.flatten)


def _is_flatten(network: nn.Module, node: Any) -> bool:
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if (node.op, node.target) in _FLATTENINGS:
        return node.args[1:] == (1,) and not node.kwargs
    return calls(network, node, _flattens)


def _flattens(module: nn.Module) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)

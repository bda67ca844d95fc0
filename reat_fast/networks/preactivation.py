"""Find, by tracing a network, the BatchNorms that only a ReLU reads, and merge them.

Where BatchNorm comes before the convolution it reads a sum as a rule, and cannot be folded. In eval
mode it is a constant scale and shift for each channel: sum, BatchNorm and ReLU are one pass.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from reat_fast.kernels.affine_relu import affine_relu, affine_relu_linked
from reat_fast.kernels.fused_conv import conv_relu
from reat_fast.kernels.triton_support import Backend
from reat_fast.networks.tracing import calls, is_one_of, is_relu, summands, writes_into_first

# One with an activation inside is none of them.
_BATCHNORMS = ("BatchNorm2d", "SyncBatchNorm", "SyncedBatchNorm")
_READERS: tuple[Any, ...] = (affine_relu, affine_relu_linked, conv_relu, F.conv2d)


@dataclass(frozen=True)
class Affine:
    """A BatchNorm of the rewritten network, and the scale and shift [C] that stand for it."""

    norm: Any  # a BatchNorm; that its weight and statistics are there is seen to
    scale: Tensor
    shift: Tensor


def fuse_preactivations(network: nn.Module, graph: fx.Graph, backend: Backend) -> list[Affine]:
    """Rewrite relu(bn(x)) and relu(bn(x + y)) of a network in eval mode as affine_relu.

    x + y may have other readers, if they write nothing into it. backend: that of affine_relu.
    Returns what refresh_affines_ is to be called on whenever a BatchNorm of the network changes.
    """
    affines: dict[str, Affine] = {}
    for node in list(graph.nodes):
        if calls(network, node, _is_plain) and len(node.args) == 1 and not node.kwargs:
            relu = next(iter(node.users)) if len(node.users) == 1 else None
            if relu is not None and is_relu(network, relu) and relu.args[:1] == (node,):
                _fuse(network, graph, node, relu, affines, backend)
    found = list(affines.values())
    refresh_affines_(found)
    return found


@torch.no_grad()
def refresh_affines_(affines: list[Affine]) -> None:
    """Take up what the BatchNorms are now, in the same memory; may not sync."""
    if not affines:
        return
    scales, shifts = [a.scale for a in affines], [a.shift for a in affines]
    torch._foreach_copy_(scales, [a.norm.running_var for a in affines])
    torch._foreach_add_(scales, [a.norm.eps for a in affines])
    torch._foreach_rsqrt_(scales)
    torch._foreach_mul_(scales, [a.norm.weight.to(a.scale.dtype) for a in affines])
    torch._foreach_copy_(shifts, [a.norm.bias for a in affines])
    means = [a.norm.running_mean.to(a.scale.dtype) for a in affines]
    torch._foreach_addcmul_(shifts, means, scales, value=-1)


def _fuse(
    network: nn.Module,
    graph: fx.Graph,
    norm: fx.Node,
    relu: fx.Node,
    affines: dict[str, Affine],
    backend: Backend,
) -> None:
    """Put one node in the place of a BatchNorm, its ReLU and, where that may be, the sum before."""
    source: Any = norm.args[0]
    others = [reader for reader in source.users if reader is not norm]
    only_read = all(_only_reads(network, reader) for reader in others)
    summed = only_read and _is_plain_sum(source)
    # A convolution's output is no view of maps that something else may write to.
    linked = bool(others) and (summed or (only_read and calls(network, source, _is_conv)))
    first = source if summed else norm
    if linked and not summed:  # all that read it get what the new node returns
        first = next(node for node in graph.nodes if node in source.users)
    x, residual = source.args if summed else (source, None)
    name = str(norm.target)
    if name not in affines:  # a module in two places
        affines[name] = _register(network.get_submodule(name))
    with graph.inserting_before(first):
        scale, shift = (graph.get_attr(f"{name}.affine_{end}") for end in ("scale", "shift"))
        function = affine_relu_linked if linked else affine_relu
        given = (x, scale, shift, residual)
        output = fused = graph.call_function(function, given, {"backend": backend})
        if linked:
            output = graph.call_function(operator.getitem, (fused, 0))
            total = graph.call_function(operator.getitem, (fused, 1))
            for reader in others:
                reader.replace_input_with(source, total)
    relu.replace_all_uses_with(output)
    graph.erase_node(relu)
    graph.erase_node(norm)
    if summed:
        graph.erase_node(source)


def _register(norm: Any) -> Affine:
    """Give a BatchNorm memory for its scale and shift, which is never coarser than float32."""
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    for end in ("scale", "shift"):
        values = torch.empty_like(norm.running_mean, dtype=dtype)
        norm.register_buffer(f"affine_{end}", values, persistent=False)
    return Affine(norm, norm.affine_scale, norm.affine_shift)


def _is_plain(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or not is_one_of(module, _BATCHNORMS):
        return False
    return module.affine and module.running_mean is not None and not module.training


def _is_plain_sum(node: fx.Node) -> bool:
    """Say whether a node is u + v of two nodes, and writes into neither."""
    return summands(node) is not None and not writes_into_first(node)


def _only_reads(network: nn.Module, node: fx.Node) -> bool:
    """Say whether a node is known to write into none of its inputs and to return no view of one."""
    if node.op == "call_function" and node.target in _READERS:
        return True
    return _is_plain_sum(node) or calls(network, node, _is_conv)


def _is_conv(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d

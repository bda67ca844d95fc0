"""The network as an update sees it: BatchNorm, the sum and the ReLU behind it in one op.

An update runs in train mode and changes weights and running statistics, so what is rewritten goes
on using the network's own modules: parameters, buffers and settings are theirs, and are read at
each call. Where a call finds a module otherwise than it was traced, the network computes as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reat_fast.kernels.batchnorm import fused_batchnorm
from reat_fast.kernels.own_conv import faster_on
from reat_fast.kernels.triton_support import Backend
from reat_fast.networks.architectures import Network
from reat_fast.networks.tracing import (
    calls,
    drop_identities,
    is_relu,
    is_traced_into,
    summands,
    trace_training,
    writes_into_first,
)

METHOD = "forward_features_logits"


def fused_update_pays(device: torch.device) -> bool:
    """Say whether it is known to be the faster on a device, in bfloat16 and replayed from a graph.

    On an H100 a step of ResNet-18 takes 10.0 ms with it and 10.5 without (docs/performance.md).
    """
    return faster_on(device)


class FusedUpdate:
    """Compute features and logits of a network in train mode, BatchNorms fused where that may be.

    network: stays the owner of all weights, statistics and settings, and is written to by its
    BatchNorms alone. backend: that of fused_batchnorm. fused: number of BatchNorms rewritten, 0 for
    a network that cannot be traced, which is used as it is; so is one whose modules, taken apart by
    the trace, have hooks or are not in train mode by the time of a call.
    """

    def __init__(self, network: Network, backend: Backend = "auto") -> None:
        self._network = network
        self._rewritten: fx.GraphModule | None = None
        self._skipped = [module for module in network.modules() if is_traced_into(module)]
        """Modules that a call passes by: their code is in the graph, or nowhere any more."""
        self.fused = 0
        graph = trace_training(network, METHOD)
        if graph is None:
            return
        self._skipped += drop_identities(network, graph)
        norms: dict[str, FusedBatchNorm] = {}
        uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
        for node in list(graph.nodes):
            if calls(network, node, _is_plain) and len(node.args) == 1 and not node.kwargs:
                alone = uses[node.target] == 1
                self._skipped += _fuse(network, graph, node, alone, norms, backend)
        if norms:
            self._rewritten = fx.GraphModule(_targets(network, graph, norms), graph)
            self.fused = len(norms)

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [B, D] and the logits [B, K] of images [B, C, H, W]; may not sync."""
        if self._rewritten is None or not all(map(_as_traced, self._skipped)):
            return self._network.forward_features_logits(images)
        features, logits = self._rewritten(images)
        return features, logits


class FusedBatchNorm(nn.Module):
    """Call a BatchNorm with the sum and the ReLU behind it; the module is the network's own.

    in_place: whether the network adds into the output of the BatchNorm, whose type then stays.
    """

    def __init__(self, norm: nn.BatchNorm2d, relu: bool, in_place: bool, backend: Backend) -> None:
        super().__init__()
        self.norm, self.relu, self.in_place, self.backend = norm, relu, in_place, backend

    def forward(self, x: Tensor, residual: Any = None) -> Tensor:
        norm: Any = self.norm
        if _is_plain(norm) and _as_traced(norm) and x.ndim == 4 and _alike(x, residual):
            return fused_batchnorm(
                *(x, norm.weight, norm.bias, norm.running_mean, norm.running_var),
                *(norm.num_batches_tracked, norm.momentum, norm.eps, residual, self.relu),
                backend=self.backend,
            )
        output: Tensor = norm(x)
        if residual is not None:
            if self.in_place:
                output += residual
            else:
                output = output + residual
        return F.relu(output) if self.relu else output


def _fuse(
    network: nn.Module,
    graph: fx.Graph,
    norm: fx.Node,
    alone: bool,
    norms: dict[str, FusedBatchNorm],
    backend: Backend,
) -> list[nn.Module]:
    """Put one node in the place of a BatchNorm and of the sum and the ReLU that it ends in.

    alone: whether the module is called but once; a sum is computed where it stands, which may be
    behind another call. norms: gets what the node calls. Returns modules that nothing calls now.
    """
    end, residual = norm, None
    added = _only_reader(norm, norms)
    if alone and added is not None:
        residual = _other_summand(added, norm)
        end = norm if residual is None else added
    relu = _only_reader(end, norms)
    if relu is not None and not (is_relu(network, relu) and relu.args[:1] == (end,)):
        relu = None
    name = f"fused_batchnorm_{len(norms)}"
    module: Any = network.get_submodule(str(norm.target))
    norms[name] = FusedBatchNorm(module, relu is not None, writes_into_first(end), backend)
    with graph.inserting_before(end):
        output = graph.call_module(name, norm.args if residual is None else (*norm.args, residual))
    (relu or end).replace_all_uses_with(output)
    for node in dict.fromkeys((relu or end, end, norm)):
        graph.erase_node(node)
    if relu is None or relu.op != "call_module":
        return []
    return [network.get_submodule(str(relu.target))]


def _only_reader(node: fx.Node, norms: dict[str, FusedBatchNorm]) -> fx.Node | None:
    """Return what alone reads a node, unless it is rewritten already."""
    reader = next(iter(node.users)) if len(node.users) == 1 else None
    return None if reader is None or reader.target in norms else reader


def _other_summand(added: fx.Node, norm: fx.Node) -> fx.Node | None:
    """Return what is added to the output of a BatchNorm, None where that cannot be fused.

    An output that is added into another tensor, in place, cannot: that tensor may be read later.
    """
    both = summands(added)
    if both is None:
        return None
    first, second = both
    if first is norm:
        return second
    return None if writes_into_first(added) else first


def _targets(
    network: nn.Module, graph: fx.Graph, norms: dict[str, FusedBatchNorm]
) -> dict[str, Any]:
    """Return all that the nodes of a graph name."""
    names = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    own = {name: operator.attrgetter(name)(network) for name in names if name not in norms}
    return {**own, **norms}


def _is_plain(module: nn.Module) -> bool:
    """Say whether a module is the BatchNorm that fused_batchnorm computes, as it stands now."""
    if type(module) is not nn.BatchNorm2d or not module.track_running_stats:
        return False
    needed: Sequence[object] = (
        *(module.weight, module.bias, module.momentum),
        *(module.running_mean, module.running_var, module.num_batches_tracked),
    )
    return all(value is not None for value in needed)


def _as_traced(module: nn.Module) -> bool:
    """Say whether a module is in train mode and calls nothing of others."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return module.training and not any(hooks)


def _alike(x: Tensor, residual: Any) -> bool:
    if residual is None:
        return True
    return isinstance(residual, Tensor) and (residual.shape, residual.dtype) == (x.shape, x.dtype)

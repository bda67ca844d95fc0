"""Find, by tracing a network, what can be merged with a convolution, and merge it.

In eval mode BatchNorm is a constant scale and shift per channel. Where it reads a convolution whose
output nothing else reads, both are one convolution. The same trace shows which convolutions end in
ReLU, alone or after a residual sum, and whether a linear layer reads the average over the pixels.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from reat_fast.kernels.fused_conv import conv_relu, conv_relu_linked
from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.kernels.triton_support import Backend
from reat_fast.networks.pooling import fuse_poolings
from reat_fast.networks.preactivation import Affine, fuse_preactivations
from reat_fast.networks.tracing import calls, drop_identities, is_add, is_relu, trace

# By name, as timm need not be there. Its subclasses compute what their PyTorch parents do, with
# other padding or an activation behind; any other subclass may treat its weights in its own way.
_CONVS = ("Conv2d", "Conv2dSame")
_BATCHNORMS = (
    "BatchNorm2d",
    "BatchNormAct2d",
    "SyncBatchNorm",
    "SyncBatchNormAct",
    "SyncedBatchNorm",  # of reat_fast.engine.distributed
)

CHANNELS = 8
"""What the channels of cuDNN's fused engines must be a multiple of: 16 bytes of bfloat16."""


@dataclass(frozen=True)
class Fold:
    """A convolution and the BatchNorm behind it; weight and bias of what stands for both."""

    conv: nn.Conv2d
    bn: Any  # a BatchNorm; that its weight and statistics are there is seen to
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class JoinedBias:
    """The bias of a convolution with that of the one whose output is added: total = own + other."""

    total: Tensor
    own: Tensor
    other: Tensor


class Fused(NamedTuple):
    """A rewritten network, the number of fused convolutions, and what follows other tensors."""

    network: nn.Module
    convolutions: int
    biases: list[JoinedBias]
    affines: list[Affine]


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


def fuse_relus(
    network: nn.Module, backend: Backend = "auto", preactivations: bool = False
) -> Fused:
    """Rewrite relu(conv(x)) and relu(conv(x) + y) of a network in eval mode as conv_relu.

    And linear(mean(x)) over the pixels as pooled_linear, and with preactivations relu(bn(x + y)) as
    affine_relu. backend: that of all. Weights of few input channels become views of memory with
    zeros behind. Returns a network on the same weights, in which the sums of joined biases, and the
    scales and shifts, are the caller's to write whenever what they come from changes; the given
    network itself and 0 where it cannot be traced.
    """
    graph = trace(network)
    if graph is None:
        return Fused(network, 0, [], [])
    drop_identities(network, graph)
    relus = [node for node in graph.nodes if is_relu(network, node)]
    biases: list[JoinedBias] = []
    fused = sum(_fuse(network, graph, relu, backend, biases) for relu in relus)
    affines = fuse_preactivations(network, graph, backend) if preactivations else []
    fuse_poolings(network, graph, backend)
    _link(network, graph)
    rewritten = fx.GraphModule(network, graph) if fused or affines else network
    return Fused(rewritten, fused, biases, affines)


def _find_folds(network: nn.Module) -> list[tuple[str, str]]:
    """Name each convolution and the BatchNorm that can be folded into it."""
    graph = trace(network)
    if graph is None:
        return []
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    folds = []
    for node in graph.nodes:
        source: Any = node.args[0] if node.args else None
        if (
            calls(network, node, _is_plain_batchnorm)
            and calls(network, source, _is_plain_conv)
            and len(source.users) == 1
            # A module in two places has one weight for both.
            and uses[source.target] == uses[node.target] == 1
        ):
            folds.append((source.target, node.target))
    return folds


def _fuse(
    network: nn.Module,
    graph: fx.Graph,
    relu: fx.Node,
    backend: Backend,
    biases: list[JoinedBias],
) -> bool:
    """Put one conv_relu in the place of a ReLU and what it reads, if that allows it."""
    end: Any = relu.args[0] if relu.args else None
    if not isinstance(end, fx.Node) or len(end.users) != 1:
        return False
    conv, residual = _summands(network, end)
    if conv is None or len(conv.users) != 1:
        return False
    module: Any = network.get_submodule(conv.target)
    name = _fill_channels_(module)
    with graph.inserting_before(end):
        weight = graph.get_attr(f"{conv.target}.{name}")
        bias = None if module.bias is None else graph.get_attr(f"{conv.target}.bias")
        summand = residual
        if residual is not None and _can_join(network, module, residual):
            summand, bias = _join_biases(network, graph, conv, residual, biases)
        geometry = (module.stride, module.padding, module.dilation, module.groups)
        given = (conv.args[0], weight, bias, summand, *geometry)
        output = graph.call_function(conv_relu, given, {"backend": backend})
    relu.replace_all_uses_with(output)
    replaced = [relu, end, conv] if summand is residual else [relu, end, conv, residual]
    for node in dict.fromkeys(replaced):
        graph.erase_node(node)
    return True


def _can_join(network: nn.Module, module: nn.Module, residual: fx.Node) -> bool:
    if not calls(network, residual, _is_biased_conv) or len(residual.users) != 1:
        return False
    # A module in two places may be added to another convolution in each.
    return module.bias is not None and not hasattr(module, "joined_bias")


def _join_biases(
    network: nn.Module,
    graph: fx.Graph,
    conv: fx.Node,
    residual: fx.Node,
    biases: list[JoinedBias],
) -> tuple[fx.Node, fx.Node]:
    """Take the bias from a convolution that is the residual, and add it to that of the other.

    One pass over the maps less. The sum has memory of its own, for the many calls between two
    changes of the weights.
    """
    module: Any = network.get_submodule(str(conv.target))
    other: Any = network.get_submodule(str(residual.target))
    module.register_buffer("joined_bias", module.bias + other.bias, persistent=False)
    biases.append(JoinedBias(module.joined_bias, module.bias, other.bias))
    weight = graph.get_attr(f"{residual.target}.weight")
    geometry = (other.stride, other.padding, other.dilation, other.groups)
    plain = graph.call_function(F.conv2d, (residual.args[0], weight, None, *geometry))
    return plain, graph.get_attr(f"{conv.target}.joined_bias")


def _link(network: nn.Module, graph: fx.Graph) -> None:
    """Let the first reader of each conv_relu make the mask of its gradient, where it can.

    That is another, or the linear layer behind the average. A second reader gets what it reads from
    the first, so that its gradient is there by then.
    """
    place = {node: index for index, node in enumerate(graph.nodes)}
    masked: dict[fx.Node, fx.Node] = {}  # each conv_relu, and whom it leaves its mask to
    others: dict[fx.Node, fx.Node] = {}  # who masks, and the second reader of what it reads
    for node in graph.nodes:
        readers = sorted(node.users, key=place.__getitem__)
        if node.target is conv_relu and _can_mask(network, node, readers):
            masked[node] = readers[0]
            if len(readers) == 2:
                others[readers[0]] = readers[1]
    for reader in masked.values():
        if reader.target is pooled_linear:
            reader.kwargs = {**reader.kwargs, "masks_input": True}
    for node in [node for node in graph.nodes if node.target is conv_relu]:
        flags: dict[str, Any] = {
            "masks_input": node in masked.values(),
            "reader_masks": node in masked,
        }
        other = others.get(node)
        with graph.inserting_before(node):
            if other is not None and _is_shortcut(other):
                _, weight, _, *geometry = other.args
                # Named anew, as it stands further down in the graph.
                again = graph.get_attr(str(weight.target))  # type: ignore[union-attr]
                flags["shortcut"] = (again, tuple(geometry))
            linked = graph.call_function(conv_relu_linked, node.args, {**node.kwargs, **flags})
            output = graph.call_function(operator.getitem, (linked, 0))
            if other is not None:
                second = graph.call_function(operator.getitem, (linked, 1))
        node.replace_all_uses_with(output)
        graph.erase_node(node)
        if other is None:
            continue
        if "shortcut" in flags:
            other.replace_all_uses_with(second)
            graph.erase_node(other)
        else:
            other.replace_input_with(linked.all_input_nodes[0], second)


def _is_shortcut(node: fx.Node) -> bool:
    """Say whether a node is a convolution without bias as _join_biases writes it.

    A network's own calls of conv2d may have anything as weight, and arguments by name or left out.
    """
    if node.target is not F.conv2d or node.kwargs or len(node.args) != 7:
        return False
    _, weight, bias, *_ = node.args
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and bias is None


def _can_mask(network: nn.Module, node: fx.Node, readers: list[fx.Node]) -> bool:
    """Say whether one or two convolutions and nothing else read a node, the first as its input.

    Or a linear layer behind the average, alone.
    """
    if len(readers) == 1 and readers[0].target is pooled_linear:
        return True
    if not 1 <= len(readers) <= 2 or not all(_only_reads(network, reader) for reader in readers):
        return False
    first = readers[0]
    return first.target is conv_relu and first.args[0] is node and node not in first.args[1:]


def _only_reads(network: nn.Module, node: fx.Node) -> bool:
    if node.target in (conv_relu, F.conv2d):
        return True
    return calls(network, node, lambda module: type(module) is nn.Conv2d)


def _fill_channels_(conv: nn.Conv2d) -> str:
    """Name the weight of a convolution whose input channels fill CHANNELS, zeros behind.

    Where they do not, the convolution's own weight becomes a view of that, so it follows what is
    written to the weight.
    """
    missing = -conv.in_channels % CHANNELS
    if not missing:
        return "weight"
    if hasattr(conv, "filled_weight"):  # a module in two places
        return "filled_weight"
    filled = F.pad(conv.weight.detach(), (0, 0, 0, 0, 0, missing))
    conv.weight.data = filled[:, : conv.in_channels]
    conv.register_buffer("filled_weight", filled, persistent=False)
    return "filled_weight"


def _summands(network: nn.Module, end: fx.Node) -> tuple[Any, fx.Node | None]:
    """Return the convolution and the other summand that a ReLU reads; None for what is not there.

    A convolution added into another tensor, in place, is none: that tensor may be read later.
    """
    if calls(network, end, _is_dense_conv):
        return end, None
    if not is_add(end) or end.kwargs or len(end.args) != 2:
        return None, None
    first, second = end.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None, None
    if calls(network, first, _is_dense_conv):
        return first, second
    in_place = end.target in (operator.iadd, "add_")
    if not in_place and calls(network, second, _is_dense_conv):
        return second, first
    return None, None


def _is_plain_conv(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and type(module).__name__ in _CONVS


def _is_plain_batchnorm(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or type(module).__name__ not in _BATCHNORMS:
        return False
    return module.affine and module.running_mean is not None


def _is_dense_conv(module: nn.Module) -> bool:
    # Grouped ones have kernels of their own in PyTorch.
    if type(module) is not nn.Conv2d or module.groups != 1 or module.out_channels % CHANNELS:
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _is_biased_conv(module: nn.Module) -> bool:
    return _is_dense_conv(module) and module.bias is not None

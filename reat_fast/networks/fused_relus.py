"""Find, by tracing a network, the convolutions that end in ReLU, and rewrite each as one op.

Neither ReLU nor a residual sum before it is then a pass over the maps of its own. Nor is the bias
of a convolution that is the residual: it is added to the bias of the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn import functional as F

from reat_fast.kernels.fused_conv import conv_relu
from reat_fast.kernels.triton_support import Backend
from reat_fast.networks.mask_links import link_masks
from reat_fast.networks.pooling import fuse_poolings
from reat_fast.networks.preactivation import Affine, fuse_preactivations
from reat_fast.networks.tracing import (
    calls,
    drop_identities,
    is_relu,
    summands,
    trace,
    writes_into_first,
)

CHANNELS = 8
"""What the channels of cuDNN's fused engines must be a multiple of: 16 bytes of bfloat16."""


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
    link_masks(network, graph)
    rewritten = fx.GraphModule(network, graph) if fused or affines else network
    return Fused(rewritten, fused, biases, affines)


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


def _summands(network: nn.Module, end: fx.Node) -> tuple[Any, fx.Node | None]:
    """Return the convolution and the other summand that a ReLU reads; None for what is not there.

    A convolution added into another tensor, in place, is none: that tensor may be read later.
    """
    if calls(network, end, _is_dense_conv):
        return end, None
    added = summands(end)
    if added is None:
        return None, None
    first, second = added
    if calls(network, first, _is_dense_conv):
        return first, second
    if not writes_into_first(end) and calls(network, second, _is_dense_conv):
        return second, first
    return None, None


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


def _is_dense_conv(module: nn.Module) -> bool:
    # Grouped ones have kernels of their own in PyTorch.
    if type(module) is not nn.Conv2d or module.groups != 1 or module.out_channels % CHANNELS:
        return False
    return module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _is_biased_conv(module: nn.Module) -> bool:
    return _is_dense_conv(module) and module.bias is not None

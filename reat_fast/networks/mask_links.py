"""Let the readers of the fused convolutions make the masks of their gradients, where they can.

The gradient of relu(conv(x)) is masked where the output is zero. Who reads the output has it at
hand in its own backward, and writes its gradient masked: one pass over the maps less.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from reat_fast.kernels.fused_conv import conv_relu, conv_relu_linked
from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.networks.tracing import calls


def link_masks(network: nn.Module, graph: fx.Graph) -> None:
    """Let the first reader of each conv_relu make the mask of its gradient, where it can.

    That is another, or the linear layer behind the average. A second reader gets what it reads from
    the first, so that its gradient is there by then.
    """
    readers = _masking_readers(network, graph)
    seconds = dict(readers.values())  # who masks, and the second reader of what it reads
    for first in seconds:
        if first.target is pooled_linear:
            first.kwargs = {**first.kwargs, "masks_input": True}
    for node in [node for node in graph.nodes if node.target is conv_relu]:
        flags = {"masks_input": node in seconds, "reader_masks": node in readers}
        _rewrite(graph, node, seconds.get(node), flags)


def _masking_readers(
    network: nn.Module, graph: fx.Graph
) -> dict[fx.Node, tuple[fx.Node, fx.Node | None]]:
    """Return each conv_relu that may leave its mask to a reader, that reader and the second one."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    found: dict[fx.Node, tuple[fx.Node, fx.Node | None]] = {}
    for node in graph.nodes:
        readers = sorted(node.users, key=place.__getitem__)
        if node.target is conv_relu and _can_mask(network, node, readers):
            found[node] = (readers[0], readers[1] if len(readers) == 2 else None)
    return found


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


def _rewrite(graph: fx.Graph, node: fx.Node, other: fx.Node | None, flags: dict[str, Any]) -> None:
    """Put conv_relu_linked in the place of a conv_relu, and `other` behind it or into it.

    other: the second reader of what the node reads, where the node makes the mask for both.
    """
    with graph.inserting_before(node):
        if other is not None and _is_shortcut(other):
            _, weight, _, *geometry = other.args
            # Named anew, as it stands further down in the graph.
            again = graph.get_attr(str(weight.target))  # type: ignore[union-attr]
            flags = {**flags, "shortcut": (again, tuple(geometry))}
        linked = graph.call_function(conv_relu_linked, node.args, {**node.kwargs, **flags})
        output = graph.call_function(operator.getitem, (linked, 0))
        if other is not None:
            second = graph.call_function(operator.getitem, (linked, 1))
    node.replace_all_uses_with(output)
    graph.erase_node(node)
    if other is None:
        return
    if "shortcut" in flags:
        other.replace_all_uses_with(second)
        graph.erase_node(other)
    else:
        other.replace_input_with(linked.all_input_nodes[0], second)


def _is_shortcut(node: fx.Node) -> bool:
    """Say whether a node is a convolution without bias as fused_relus.py writes it.

    A network's own calls of conv2d may have anything as weight, and arguments by name or left out.
    """
    if node.target is not F.conv2d or node.kwargs or len(node.args) != 7:
        return False
    _, weight, bias, *_ = node.args
    return isinstance(weight, fx.Node) and weight.op == "get_attr" and bias is None

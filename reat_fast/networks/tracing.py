"""What a network does with its convolutions and BatchNorms, as a graph by torch.fx."""

from __future__ import annotations

import inspect
import operator
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

HOMES = ("torch", "timm", "reat_fast")
_RELU_FUNCTIONS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_)
_ADD_FUNCTIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


def trace(network: nn.Module) -> fx.Graph | None:
    """Trace what a network in eval mode does with its convolutions and BatchNorms.

    All that holds neither is one node. What a replay of the graph could not do again is refused: a
    random choice of the network's own code, a tensor it makes, a context such as no_grad or
    autocast, an attribute it sets, a hook on what the graph holds. Returns None there, and for a
    network that cannot be traced, as one whose path depends on the values or the shape of the
    images.
    """
    return _traced(network, "forward", training=False)


def trace_training(network: nn.Module, method: str) -> fx.Graph | None:
    """Trace a method of a network in train mode, as trace does, whatever its modules' modes are."""
    return _traced(network, method, training=True)


def _traced(network: nn.Module, method: str, training: bool) -> fx.Graph | None:
    inlined = [module for module in network.modules() if is_traced_into(module)]
    if any(map(has_hooks, inlined)):
        return None
    try:
        with _no_random_numbers(), _in_mode(inlined, training):
            return _Tracer(method).trace(network)
    except Exception:  # the network's own code meets stand-ins for tensors: anything can come of it
        return None


def is_traced_into(module: nn.Module) -> bool:
    """Say whether a graph holds what a module does; all others it calls, as they are by then."""
    if isinstance(module, (nn.Conv2d, _BatchNorm)):
        return False
    return any(isinstance(m, (nn.Conv2d, _BatchNorm)) for m in module.modules())


def calls(network: nn.Module, node: Any, kind: Callable[[nn.Module], bool]) -> bool:
    """Say whether a node calls a module of a kind that computes what its class does."""
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return False
    module = network.get_submodule(str(node.target))
    return is_as_made(module) and kind(module)


def is_as_made(module: nn.Module) -> bool:
    """Say whether a module computes what its class does, on parameters of its own.

    Not with hooks, as pruning and spectral norm have them, nor with a forward put on the object.
    """
    return not has_hooks(module) and not {"forward", "weight", "bias"} & vars(module).keys()


def is_foreign(network: nn.Module) -> bool:
    """Say whether a network is none of this package or timm as made, but may run code of others."""
    return type(network).__module__.partition(".")[0] == "torch" or any(
        type(module).__module__.partition(".")[0] not in HOMES or not is_as_made(module)
        for module in network.modules()
    )


def has_hooks(module: nn.Module) -> bool:
    """Say whether a module calls others' hooks, which may change what it takes, gives or passes."""
    hooks = (
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
        *module._backward_pre_hooks.values(),
    )
    return any(not str(getattr(hook, "__module__", "")).startswith("reat_fast.") for hook in hooks)


def is_one_of(module: nn.Module, names: Sequence[str]) -> bool:
    """Say whether a module's class has one of these names in PyTorch, timm or this package.

    By name, as timm need not be there.
    """
    kind = type(module)
    return kind.__name__ in names and kind.__module__.partition(".")[0] in HOMES


def drop_identities(network: nn.Module, graph: fx.Graph) -> list[nn.Module]:
    """Take the calls of nn.Identity out of a graph; returns the modules that they were of."""
    gone = []
    for node in list(graph.nodes):
        if calls(network, node, lambda module: type(module) is nn.Identity):
            gone.append(network.get_submodule(str(node.target)))
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return gone


def is_relu(network: nn.Module, node: fx.Node) -> bool:
    """Say whether a node is a ReLU, in place or not."""
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    if node.op == "call_function":
        return node.target in _RELU_FUNCTIONS
    return calls(network, node, lambda module: type(module) is nn.ReLU)


def summands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return what a node adds, in place or not; None for no sum, or not of two different nodes."""
    called = node.op == "call_function" and node.target in _ADD_FUNCTIONS
    is_add = called or (node.op == "call_method" and node.target in ("add", "add_"))
    if not is_add or node.kwargs or len(node.args) != 2:
        return None
    first, second = node.args
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    return first, second


def writes_into_first(node: fx.Node) -> bool:
    """Say whether a node is a sum that is written into its first summand."""
    return node.op != "call_module" and node.target in (operator.iadd, "add_")


class _Proxy(fx.Proxy):
    """Keep `a += b` what it is; fx would trace a + b, and another name of `a` would miss it."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._write(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._write(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._write(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._write(operator.itruediv, other)

    def _write(self, function: Callable[..., Any], other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is written to a buffer is part of the graph

    def __init__(self, method: str) -> None:
        super().__init__()
        self.traced_func_name = method
        self._context = _context()

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _context() != self._context:
            raise ValueError("a graph has no contexts")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise ValueError("a graph would keep this tensor for ever")
        return super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return not is_traced_into(module)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        # Given by name, the input would not be where those who read the graph look for it.
        first = next(iter(inspect.signature(m.forward).parameters.values()), None)
        if first is not None and first.name in kwargs and first.kind is first.POSITIONAL_OR_KEYWORD:
            args = (kwargs[first.name], *args)
            kwargs = {name: value for name, value in kwargs.items() if name != first.name}
        return super().call_module(m, forward, args, kwargs)


def _context() -> tuple[bool, bool, int]:
    depth = torch.autocast_increment_nesting()  # of contexts that switch it on or off
    torch.autocast_decrement_nesting()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), depth


@contextmanager
def _no_random_numbers() -> Iterator[None]:
    """Raise ValueError where a block drew random numbers, and take that back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        before = _random_states(devices)
        try:
            yield
            if _random_states(devices) != before:
                raise ValueError("a graph would keep this choice for ever")
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _random_states(devices: Iterable[int]) -> list[object]:
    states = [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]
    numpy: Any = np.random.get_state()
    keys = (numpy[1].tobytes(), *numpy[2:])
    return [random.getstate(), keys, *(state.numpy().tobytes() for state in states)]


@contextmanager
def _in_mode(modules: list[nn.Module], training: bool) -> Iterator[None]:
    """Set the mode of modules alone; raise ValueError where the block set anything else of them.

    Whatever it did set is taken back.
    """
    before = [dict(vars(module)) for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
        if not all(map(_same, map(vars, modules), before)):
            raise ValueError("a graph would not set this again")
    finally:
        for module, attributes in zip(modules, before, strict=True):
            vars(module).clear()
            vars(module).update(attributes)


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    ours = "training"
    return now.keys() == before.keys() and all(
        now[name] is before[name] for name in now if name != ours
    )

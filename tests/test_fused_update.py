"""A network rewritten for its update computes what it did, and its modules stay its own."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_frozen import trained
from torch import Tensor, nn
from torch.nn import functional as F

from reat_fast.models import NAMES
from reat_fast.networks.fused_update import FusedBatchNorm, FusedUpdate

WIDTH = 4
Body = Callable[[Any, Tensor], Tensor]


class Small(nn.Module):
    """A network of two convolutions and BatchNorms that a test wires as it likes."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Conv2d(3, WIDTH, 3, padding=1) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.relu, self.in_place = nn.ReLU(), nn.ReLU(inplace=True)
        self.nothing = nn.Identity()
        self.scale = nn.Parameter(torch.randn(1, WIDTH, 1, 1))
        self.register_buffer("steps", torch.zeros(()))
        self.fc = nn.Linear(WIDTH, 5)
        self.body = body
        self.train()

    def forward_features_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(self, images).mean((2, 3))
        return features, self.fc(features)


class Block(nn.Module):
    """A module of modules, whose code a trace takes apart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(self.norm(self.conv(x))), 0.5, self.training)


def fused(network: nn.Module) -> FusedUpdate:
    return FusedUpdate(network)  # type: ignore[arg-type]


def kinds(update: FusedUpdate) -> list[str]:
    """Name what stands behind each rewritten BatchNorm, in order of the calls."""
    graph = update._rewritten
    if graph is None:
        return []
    found = []
    for node in graph.graph.nodes:
        module = graph.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, FusedBatchNorm):
            found.append("norm" + " sum" * (len(node.args) - 1) + " relu" * module.relu)
    return found


def outcome(
    network: nn.Module, forward: Callable[[Tensor], Any], size: int = 16
) -> dict[str, Tensor]:
    """Take two updates; return outputs, the last gradients, and all of the network's state."""
    made = torch.Generator().manual_seed(1)
    weight = next(network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    torch.manual_seed(2)
    for _ in range(2):
        images = torch.rand(4, 3, size, size, generator=made).to(weight)
        features, logits = forward(images.requires_grad_())
        optimizer.zero_grad()
        (features.square().sum() + logits.sin().sum()).backward()
        optimizer.step()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    found = {f"gradient of {name}": gradient for name, gradient in gradients.items()}
    if images.grad is not None:
        found["gradient of the images"] = images.grad
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    return {"features": features, "logits": logits, **found, **state}


def assert_same_updates(
    network: nn.Module, update: FusedUpdate, plain: nn.Module, size: int = 16
) -> None:
    found = outcome(network, update, size)
    wanted = outcome(plain, plain.forward_features_logits, size)  # type: ignore[arg-type]
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", NAMES)
def test_every_batchnorm_of_our_networks_is_fused_and_computes_the_same_bits(name: str) -> None:
    network = trained(name, torch.float32).train()
    plain = copy.deepcopy(network)
    update = fused(network)
    assert update.fused == sum(type(m) is nn.BatchNorm2d for m in network.modules())
    assert_same_updates(network, update, plain)


def test_what_stands_behind_the_batchnorms_of_a_resnet_is_found() -> None:
    found = kinds(fused(trained("resnet18")))
    plain, shortcut = ["norm relu", "norm sum relu"], ["norm relu", "norm", "norm sum relu"]
    assert found == ["norm relu", *plain, *plain, *([*shortcut, *plain] * 3)]
    assert set(kinds(fused(trained("preact_resnet18")))) == {"norm relu"}


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name",
    [
        "resnet8",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnet18", "preact_resnet18")),
    ],
)
def test_the_kernels_are_no_further_from_float64_than_the_networks_own_modules(name: str) -> None:
    exact = trained(name, torch.float64).train()
    network, plain = copy.deepcopy(exact).float(), copy.deepcopy(exact).float()
    found = outcome(network, FusedUpdate(network, "triton"))
    modules = outcome(plain, plain.forward_features_logits)
    errors = torch.zeros(2, dtype=torch.float64)
    for key, wanted in outcome(exact, exact.forward_features_logits).items():
        size = wanted.double().norm().clamp_min(1e-30)
        for index, values in enumerate((found, modules)):
            errors[index] += ((values[key].double() - wanted).norm() / size).detach()
    # Both round as often; which of the two comes nearer is chance, by a small factor.
    assert float(errors[0]) <= 4 * float(errors[1])


def _in_place_sum(network: Any, x: Tensor) -> Tensor:
    maps = network.norm(network.first(x))
    maps += network.second(x)
    return F.relu(maps)


def _in_place_sum_of_another_type(network: Any, x: Tensor) -> Tensor:
    maps = network.norm(network.first(x))
    maps += network.second(x).double()
    return F.relu(maps)


def _sum_into_what_is_read_later(network: Any, x: Tensor) -> Tensor:
    maps = network.second(x)
    summed = maps
    summed += network.norm(network.first(x))
    return F.relu(summed) + maps


def _rectified_in_place_and_read(network: Any, x: Tensor) -> Tensor:
    maps = network.norm(network.first(x))
    F.relu(maps, inplace=True)
    return maps * 2


def _summand_changed_behind_the_sum(network: Any, x: Tensor) -> Tensor:
    maps = network.second(x)
    summed = network.norm(network.first(x)) + maps
    maps.add_(3)
    return F.relu(summed) + maps


def _summand_changed_behind_the_norm(network: Any, x: Tensor) -> Tensor:
    maps = network.second(x)
    normal = network.norm(network.first(x))
    maps.mul_(3)
    return F.relu(normal + maps)


def _called_twice(network: Any, x: Tensor) -> Tensor:
    first = network.norm(network.first(x))
    second = network.norm(network.second(x))
    return F.relu(first + second)


def _read_twice(network: Any, x: Tensor) -> Tensor:
    maps = network.norm(network.first(x))
    return F.relu(maps) + maps


def _sum_read_twice(network: Any, x: Tensor) -> Tensor:
    maps = network.norm(network.first(x)) + network.second(x)
    return F.relu(maps) + maps


def _rectified_and_changed(network: Any, x: Tensor) -> Tensor:
    maps = network.norm(network.first(x)) + network.second(x)
    maps += 1
    return maps.square()


def _steps_counted(network: Any, x: Tensor) -> Tensor:
    network.steps.add_(1)
    return F.relu(network.norm(network.first(x)) * network.steps)


BODIES: dict[str, tuple[Body, list[str]]] = {
    "alone": (lambda n, x: n.norm(n.first(x)), ["norm"]),
    "relu": (lambda n, x: F.relu(n.norm(n.first(x))), ["norm relu"]),
    "relu in place": (lambda n, x: F.relu(n.norm(n.first(x)), inplace=True), ["norm relu"]),
    "relu by name": (lambda n, x: F.relu(input=n.norm(n.first(x))), ["norm relu"]),
    "method": (lambda n, x: n.norm(n.first(x)).relu(), ["norm relu"]),
    "method in place": (lambda n, x: n.norm(n.first(x)).relu_(), ["norm relu"]),
    "module": (lambda n, x: n.relu(n.norm(n.first(x))), ["norm relu"]),
    "module in place": (lambda n, x: n.in_place(n.norm(n.first(x))), ["norm relu"]),
    "input by name": (lambda n, x: F.relu(n.norm(input=n.first(x))), ["norm relu"]),
    "identity": (lambda n, x: n.relu(n.nothing(n.norm(n.first(x)))), ["norm relu"]),
    "identity by name": (lambda n, x: n.relu(n.nothing(input=n.norm(n.first(x)))), ["norm relu"]),
    "sum": (lambda n, x: F.relu(n.norm(n.first(x)) + n.second(x)), ["norm sum relu"]),
    "summand first": (lambda n, x: F.relu(n.second(x) + n.norm(n.first(x))), ["norm sum relu"]),
    "bare sum": (lambda n, x: n.norm(n.first(x)) + n.second(x), ["norm sum"]),
    "two norms": (
        lambda n, x: F.relu(n.norm(n.first(x)) + n.other(n.second(x))),
        ["norm", "norm sum relu"],
    ),
    "sum with itself": (lambda n, x: F.relu((h := n.norm(n.first(x))) + h), ["norm"]),
    "scaled sum": (lambda n, x: torch.add(n.norm(n.first(x)), n.second(x), alpha=2), ["norm"]),
    "number": (lambda n, x: F.relu(n.norm(n.first(x)) + 1), ["norm"]),
    "number of the graph": (
        lambda n, x: F.relu(n.norm(n.first(x)) + x.shape[2]),
        ["norm sum relu"],
    ),
    "spread summand": (lambda n, x: F.relu(n.norm(n.first(x)) + n.scale), ["norm sum relu"]),
    "own input": (lambda n, x: F.relu(n.norm(h := n.first(x)) + h), ["norm sum relu"]),
    "in-place sum": (_in_place_sum, ["norm sum relu"]),
    "in-place sum of another type": (_in_place_sum_of_another_type, ["norm sum relu"]),
    "sum into what is read later": (_sum_into_what_is_read_later, ["norm"]),
    "rectified in place and read": (_rectified_in_place_and_read, ["norm"]),
    "summand changed behind the sum": (_summand_changed_behind_the_sum, ["norm sum relu"]),
    "summand changed behind the norm": (_summand_changed_behind_the_norm, ["norm sum relu"]),
    "called twice": (_called_twice, ["norm", "norm"]),
    "read twice": (_read_twice, ["norm"]),
    "sum read twice": (_sum_read_twice, ["norm sum"]),
    "sum changed": (_rectified_and_changed, ["norm sum"]),
    "steps counted": (_steps_counted, ["norm"]),
}


@pytest.mark.parametrize("name", BODIES)
def test_only_what_may_be_is_fused_and_the_bits_stay(name: str) -> None:
    body, expected = BODIES[name]
    network = Small(body)
    plain = copy.deepcopy(network)
    update = fused(network)
    assert kinds(update) == expected
    assert update.fused == len(expected)
    assert_same_updates(network, update, plain)


def _without_gradient(network: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        maps = network.first(x)
    return F.relu(network.norm(maps))


def _without_autocast(network: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        maps = network.first(x.float())
    return F.relu(network.norm(maps))


def _by_chance(draw: Callable[[], float]) -> Body:
    def body(network: Any, x: Tensor) -> Tensor:
        maps: Tensor = F.relu(network.norm(network.first(x)))
        return maps if draw() < 0.5 else maps * 2

    return body


def _kept(network: Any, x: Tensor) -> Tensor:
    network.last = network.norm(network.first(x))
    return F.relu(network.last)


def _counted(network: Any, x: Tensor) -> Tensor:
    network.calls = getattr(network, "calls", 0) + 1
    return F.relu(network.norm(network.first(x)))


def _by_size(network: Any, x: Tensor) -> Tensor:
    maps = network.norm(network.first(x))
    return F.relu(maps) if x.shape[0] > 2 else maps


REFUSED: dict[str, Body] = {
    "no_grad": _without_gradient,
    "autocast": _without_autocast,
    "random": _by_chance(random.random),
    "torch.rand": _by_chance(lambda: float(torch.rand(()))),
    "made tensor": lambda n, x: F.relu(n.norm(n.first(x))) + torch.ones(()),
    "kept": _kept,
    "counted": _counted,
    "control flow": _by_size,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_could_do_again_is_left_as_it_is(name: str) -> None:
    network = Small(REFUSED[name])
    plain, attributes = copy.deepcopy(network), set(vars(network))
    states = random.getstate(), torch.get_rng_state()
    update = fused(network)
    assert update.fused == 0 and set(vars(network)) == attributes
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    random.seed(5)
    found = outcome(network, update)
    random.seed(5)
    wanted = outcome(plain, plain.forward_features_logits)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def _plain_subclass() -> nn.Module:
    class Own(nn.BatchNorm2d):
        pass

    return Own(WIDTH)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(WIDTH, affine=False),
        lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
        lambda: nn.BatchNorm2d(WIDTH, momentum=None),
        lambda: nn.InstanceNorm2d(WIDTH),
        lambda: nn.SyncBatchNorm(WIDTH),
        _plain_subclass,
    ],
)
def test_other_norms_are_left_as_they_are(make: Callable[[], nn.Module]) -> None:
    network = Small(lambda n, x: F.relu(n.norm(n.first(x)) + n.other(n.second(x))))
    network.norm = make()  # type: ignore[assignment]
    plain = copy.deepcopy(network)
    update = fused(network)
    assert kinds(update) == ["norm sum relu"]
    assert_same_updates(network, update, plain)


def _momentum(norm: nn.BatchNorm2d) -> None:
    norm.momentum = 0.7


def _cumulative(norm: nn.BatchNorm2d) -> None:
    norm.momentum = None


def _eps(norm: nn.BatchNorm2d) -> None:
    norm.eps = 0.3


def _frozen(norm: nn.BatchNorm2d) -> None:
    norm.eval()


def _untracked(norm: nn.BatchNorm2d) -> None:
    norm.track_running_stats = False


def _hooked(norm: nn.Module) -> None:
    norm.register_forward_hook(lambda module, given, output: output * 3)


def _seen_before(norm: nn.Module) -> None:
    norm.register_forward_pre_hook(lambda module, given: (given[0] * 3 + 1,))


@pytest.mark.parametrize(
    "change", [_momentum, _cumulative, _eps, _frozen, _untracked, _hooked, _seen_before]
)
@pytest.mark.parametrize("body", ["relu", "sum", "in-place sum"])
def test_a_norm_that_changes_later_computes_what_it_then_does(
    body: str, change: Callable[[nn.Module], None]
) -> None:
    network = Small(BODIES[body][0])
    plain = copy.deepcopy(network)
    update = fused(network)
    change(network.norm)
    change(plain.norm)
    assert_same_updates(network, update, plain)


@pytest.mark.parametrize("name", ["block", "relu", "nothing"])
@pytest.mark.parametrize("change", [_hooked, _seen_before])
def test_hooks_of_modules_that_are_taken_apart_are_called(
    name: str, change: Callable[[nn.Module], None]
) -> None:
    network = Small(lambda n, x: n.relu(n.nothing(n.other(n.block(x)))))
    network.block = Block()
    plain = copy.deepcopy(network)
    update = fused(network)
    assert update.fused == 2
    change(network.get_submodule(name))
    change(plain.get_submodule(name))
    assert_same_updates(network, update, plain)


def test_modes_are_those_of_the_call_and_stay_what_they_were() -> None:
    network = Small(lambda n, x: n.block(x))
    network.block = Block()
    network.eval()
    network.norm.train()
    modes = [module.training for module in network.modules()]
    update = fused(network)
    assert [module.training for module in network.modules()] == modes
    assert kinds(update) == ["norm relu"]
    for training in (True, False):
        plain = copy.deepcopy(network.train(training))
        assert_same_updates(network, update, plain)  # dropout draws from the same seed


def test_the_network_owns_what_it_did() -> None:
    network = trained("resnet8", torch.float32)
    names, modules = list(network.state_dict()), list(network.modules())
    attributes = [dict(vars(module)) for module in modules]
    places = [tensor.data_ptr() for tensor in network.state_dict().values()]
    update = fused(network.train())
    outcome(network, update)
    assert list(network.state_dict()) == names
    assert [tensor.data_ptr() for tensor in network.state_dict().values()] == places
    assert all(a is b for a, b in zip(network.modules(), modules, strict=True))
    for module, before in zip(modules, attributes, strict=True):
        assert vars(module).keys() == before.keys()
    copy.deepcopy(network)

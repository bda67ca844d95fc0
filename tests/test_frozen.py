"""The frozen network equals the one it came from in every form, and follows its weights."""

from __future__ import annotations

import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from reat_fast.attack import cross_entropy
from reat_fast.kernels.fused_conv import conv_relu_linked
from reat_fast.kernels.pooled_linear import FEW_CLASSES, pooled_linear
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.models import NAMES, create_model
from reat_fast.networks.architectures import Network
from reat_fast.networks.frozen import Form, FrozenNetwork


def trained(name: str, dtype: torch.dtype = torch.float64) -> Network:
    """Make a narrow network whose BatchNorms have seen data."""
    torch.manual_seed(1)
    model = create_model(name, 6, width=8).to(dtype)
    with_statistics(model)
    return model


def with_statistics(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            if module.affine:
                nn.init.uniform_(module.weight, -1.5, 1.5)
                nn.init.normal_(module.bias)
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)


def logits_and_gradient(network: Callable[[Tensor], Tensor], images: Tensor) -> tuple[Tensor, ...]:
    images = images.clone().requires_grad_()
    logits = network(images)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    return logits.detach(), gradient


def assert_equal_to_rounding(frozen: FrozenNetwork, model: nn.Module, images: Tensor) -> None:
    expected = logits_and_gradient(model.eval(), images)
    for found, wanted in zip(logits_and_gradient(frozen, images), expected, strict=True):
        # Up to a hundred layers round float64 by 1e-16 of their largest values.
        atol = 1e-10 * float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=atol)


@contextmanager
def conv_gradient_masks() -> Iterator[list[list[bool]]]:
    """Collect which gradients (input, weight, bias) each backward of a convolution computes."""
    masks: list[list[bool]] = []

    class Watch(TorchDispatchMode):
        supports_higher_order_operators = True  # as on a GPU Triton kernels in operators are

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if func is torch.ops.aten.convolution_backward.default:
                masks.append(list(args[10]))
            return func(*args, **(kwargs or {}))

    with Watch():  # type: ignore[no-untyped-call]
        yield masks


@pytest.fixture
def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.fx.GraphModule]]:
    """Let torch.compile run what it traced without generating code, and collect the graphs."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph.forward

    backend = aot_autograd(fw_compiler=keep)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.compiler.reset()
    yield graphs
    torch.compiler.reset()


@pytest.mark.parametrize("form", ["eager", "cudnn"])
@pytest.mark.parametrize("name", NAMES)
def test_folding_changes_nothing_but_rounding(name: str, form: Form) -> None:
    model = trained(name)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert_equal_to_rounding(FrozenNetwork(model, form=form), model, images)


@pytest.mark.parametrize("form", ["eager", "cudnn"])
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "preact_resnet18"])
def test_float32_is_no_further_from_float64_than_the_unfolded_network(
    name: str, form: Form
) -> None:
    truth = trained(name)
    model = trained(name, torch.float32).eval()
    model.load_state_dict(truth.state_dict())
    images = torch.rand(8, 3, 16, 16)
    wanted = logits_and_gradient(truth.eval(), images.double())
    unfolded = logits_and_gradient(model, images)
    folded = logits_and_gradient(FrozenNetwork(model, form=form), images)
    for right, a, b in zip(wanted, unfolded, folded, strict=True):
        # Both round as often; which of the two comes nearer is chance, by a small factor.
        assert float((b - right).norm()) < 4 * float((a - right).norm())


@pytest.mark.parametrize("form", ["eager", "cudnn"])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_bfloat16_rounds_folded_weights_and_keeps_batchnorm(name: str, form: Form) -> None:
    torch.manual_seed(0)
    model = create_model(name, 6, width=8)
    images = torch.rand(8, 3, 16, 16)
    for _ in range(30):
        model(images)
    frozen = FrozenNetwork(model, torch.bfloat16, form)
    expected = model.eval()(images)
    error = ((frozen(images).float() - expected).abs().max() / expected.abs().max()).detach()
    # Some twenty layers, each rounding weights and maps by 2^-9 relative, mostly averaging out.
    assert 0 < float(error) < 0.05
    kinds = {type(m): m.weight.dtype for m in frozen._copy.modules() if hasattr(m, "weight")}
    assert kinds.get(nn.Linear, torch.bfloat16) == torch.bfloat16
    assert kinds.get(nn.Conv2d, torch.bfloat16) == torch.bfloat16
    assert kinds.get(nn.BatchNorm2d, torch.float32) == torch.float32


@pytest.mark.parametrize("form", ["eager", "cudnn"])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_refresh_takes_up_new_weights_and_statistics_in_the_same_memory(
    name: str, form: Form
) -> None:
    model = trained(name)
    frozen = FrozenNetwork(model, form=form)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    before = {name: t.data_ptr() for name, t in frozen._copy.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    stale = frozen(images)
    frozen.refresh()
    wanted = model.eval()(images)
    assert not torch.allclose(stale, wanted, rtol=1e-3)
    # Float64 through some twenty layers, as above.
    torch.testing.assert_close(frozen(images), wanted, rtol=1e-10, atol=1e-10)
    assert {name: t.data_ptr() for name, t in frozen._copy.state_dict().items()} == before


@pytest.mark.parametrize("form", ["eager", "cudnn"])
def test_nothing_waits_for_the_device(form: Form, forbid_syncs: None) -> None:
    frozen = FrozenNetwork(trained("preact_resnet18"), form=form)
    frozen.refresh()
    logits_and_gradient(frozen, torch.rand(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("form", ["eager", "cudnn"])
@pytest.mark.parametrize("name", ["resnet8", "preact_resnet18"])
def test_no_weight_gets_a_gradient_and_the_source_is_left_alone(name: str, form: Form) -> None:
    model = trained(name).train()
    saved = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    frozen = FrozenNetwork(model, form=form)
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    with conv_gradient_masks() as masks:
        frozen(images).sum().backward()
    assert masks == [[True, False, False]] * convs
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in frozen._copy.parameters())
    assert model.training
    assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "unfolded", "fused"),
    [
        # Every convolution that ReLU follows: all but those of the shortcuts.
        ("resnet18", [], 17),
        ("resnet50", [], 49),
        # What normalises a sum stays; the first BatchNorm of a wide network reads the stem alone.
        ("preact_resnet18", [f"stages.{k // 2}.{k % 2}.bn" for k in range(8)] + ["bn"], 8),
        ("wrn28_10", [f"stages.{k // 4}.{k % 4}.bn" for k in range(1, 12)] + ["bn"], 13),
    ],
)
def test_what_stays_is_named_and_what_is_fused_is_counted(
    name: str, unfolded: list[str], fused: int
) -> None:
    model = trained(name)
    frozen = FrozenNetwork(model, form="cudnn")
    assert frozen.unfolded == unfolded
    assert frozen.fused == fused


def test_gradients_meet_in_one_pass_and_shortcuts_add_no_bias_of_their_own() -> None:
    frozen = FrozenNetwork(trained("resnet18"), form="cudnn")
    assert isinstance(frozen._copy, torch.fx.GraphModule)
    nodes = list(frozen._copy.graph.nodes)
    # The stem and seven blocks are read by a convolution and a sum, or by two convolutions; the
    # first convolution of each block by the second; the last block by the pooled linear layer.
    linked = [node for node in nodes if node.target is conv_relu_linked]
    assert [node.kwargs["masks_input"] for node in linked] == [False] + [True] * 16
    assert [node.kwargs["reader_masks"] for node in linked] == [True] * 17
    (pooled,) = [node for node in nodes if node.target is pooled_linear]
    assert pooled.kwargs["masks_input"] and pooled.args[0].args == (linked[-1], 0)
    taken = Counter(node.args[1] for node in nodes if node.target is operator.getitem)
    assert taken == {0: 17, 1: 8}
    assert sum("shortcut" in node.kwargs for node in linked) == 3
    assert not any(node.target in (F.conv2d, operator.add) for node in nodes)
    assert len(frozen._biases) == 3


class Heads(nn.Module):
    """A linear layer behind the average over the pixels, written in one of several ways."""

    def __init__(self, pooling: str, classes: int = 5) -> None:
        super().__init__()
        self.conv, self.pooling = nn.Conv2d(3, 8, 3), pooling
        self.pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(8, classes, bias=pooling != "without bias")

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.conv(images))
        logits: Tensor
        match self.pooling:
            case "named":
                logits = self.fc(torch.mean(maps, dim=[2, 3]))
            case "adaptive":
                logits = self.fc(self.flatten(self.pool(maps)))
            case "flattened":
                logits = self.fc(torch.flatten(self.pool(maps), 1))
            case "read twice":
                features = maps.mean((2, 3))
                logits = self.fc(features) + features.sum(1, keepdim=True)
            case "maps read twice":
                logits = self.fc(maps.mean((2, 3))) + maps.amax((1, 2, 3))[:, None]
            case "maps written":
                maps = maps * 2
                features = maps.mean((2, 3))
                maps += 1  # what the average has not seen
                logits = self.fc(features)
            case "rows":
                logits = self.fc(maps.mean((1, 2)).repeat(1, 2)[:, :8])
            case "kept dimensions":
                logits = self.fc(maps.mean((2, 3), keepdim=True).flatten(1))
            case _:
                logits = self.fc(maps.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("pooling", "classes", "fused", "masks"),
    [
        ("mean", 5, True, True),
        ("without bias", 5, True, True),
        ("named", 5, True, True),
        ("adaptive", 5, True, True),
        ("flattened", 5, True, True),
        ("maps read twice", 5, True, False),
        ("maps written", 5, True, False),
        ("mean", FEW_CLASSES + 1, False, False),
        ("read twice", 5, False, False),
        ("rows", 5, False, False),
        ("kept dimensions", 5, False, False),
    ],
)
def test_an_average_and_the_linear_layer_that_reads_it_are_one(
    pooling: str, classes: int, fused: bool, masks: bool
) -> None:
    torch.manual_seed(0)
    model = Heads(pooling, classes).double()
    frozen = FrozenNetwork(model, form="cudnn")
    assert isinstance(frozen._copy, torch.fx.GraphModule)
    nodes = [node for node in frozen._copy.graph.nodes if node.target is pooled_linear]
    assert [node.kwargs.get("masks_input", False) for node in nodes] == [masks] * fused
    assert_equal_to_rounding(frozen, model, torch.rand(2, 3, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        model.fc.weight.mul_(2)
    frozen.refresh()
    assert_equal_to_rounding(frozen, model, torch.rand(2, 3, 8, 8, dtype=torch.float64))


def test_the_cosine_head_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", 6, width=8)
    use_cosine_head(model)
    model.double()
    with_statistics(model)
    frozen = FrozenNetwork(model, form="cudnn")
    assert isinstance(frozen._copy, torch.fx.GraphModule)
    assert all(node.target is not pooled_linear for node in frozen._copy.graph.nodes)
    assert_equal_to_rounding(frozen, model, torch.rand(2, 3, 16, 16, dtype=torch.float64))


class ScaledConv(nn.Conv2d):
    """A convolution whose weights are not what it convolves with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.norm(), self.bias)


class BatchNormAct2d(nn.BatchNorm2d):
    """The layout of timm: an activation inside the BatchNorm."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))  # type: ignore[no-any-return]


class Varied(nn.Module):
    """Pairs that can be folded beside pairs that look like it."""

    def __init__(self) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, 8, 8, 1)
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.grouped, self.grouped_bn = nn.Conv2d(8, 8, 3, groups=4), BatchNormAct2d(8)
        self.shared, self.first_bn, self.second_bn = conv(), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.read_twice, self.read_twice_bn = conv(), nn.BatchNorm2d(8)
        self.scaled, self.scaled_bn = ScaledConv(8, 8, 1), nn.BatchNorm2d(8)
        self.plain, self.plain_bn = conv(), nn.BatchNorm2d(8, affine=False)
        self.last, self.last_bn = nn.ModuleList([conv(bias=False)]), nn.BatchNorm2d(8)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem_bn(self.stem(images))
        maps = self.grouped_bn(self.grouped(maps))
        maps = self.second_bn(self.shared(self.first_bn(self.shared(maps))))
        read = self.read_twice(maps)
        maps = self.read_twice_bn(read) + read
        maps = self.scaled_bn(self.scaled(maps))
        maps = self.plain_bn(self.plain(maps))
        maps = F.relu(self.last_bn(self.last[0](maps)))
        return maps.mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", ["eager", "cudnn"])
def test_only_a_batchnorm_with_a_convolution_of_its_own_is_folded(form: Form) -> None:
    torch.manual_seed(0)
    model = Varied().double()
    with_statistics(model)
    frozen = FrozenNetwork(model, form=form)
    kept = ["first_bn", "second_bn", "read_twice_bn", "scaled_bn", "plain_bn"]
    assert frozen.unfolded == kept
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64)
    assert_equal_to_rounding(frozen, model, images)


class Sums(nn.Module):
    """Sums before ReLU, one of which may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(6))

    def forward(self, images: Tensor) -> Tensor:
        one, twice, into, grows, fused, again = self.convs
        doubled = twice(images)
        maps = F.relu(doubled + doubled)
        total = maps * 2
        also_total = total
        total += into(maps)  # fused, `also_total` would lack what is added here
        maps = torch.relu(total) + also_total
        read_again = again(maps)
        maps = F.relu(read_again + maps) + read_again
        maps = F.relu(torch.add(grows(maps), maps, alpha=2))
        maps = F.relu(F.relu(one(maps)) + 0.5)
        out: Tensor = F.relu(maps + fused(maps))
        return out.mean((2, 3))


def test_fusing_sums_changes_nothing_whatever_is_written_in_place() -> None:
    torch.manual_seed(0)
    model = Sums().double()
    frozen = FrozenNetwork(model, form="cudnn")
    assert_equal_to_rounding(frozen, model, torch.rand(2, 8, 8, 8, dtype=torch.float64))
    assert frozen.fused == 2


class Drawn(nn.Module):
    """Convolutions and sums between maps that were drawn: who reads whom, and how often."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chosen = random.Random(seed)
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8))
        self.steps = [
            (chosen.choice(("relu", "relu", "relu sum", "relu sum", "conv", "sum")), *places)
            for places in (
                [chosen.randrange(max(k - 1, 0), k + 1), chosen.randrange(k + 1)] for k in range(8)
            )
        ]
        self.read = {8, chosen.randrange(9)} if seed % 2 else {8}

    def forward(self, images: Tensor) -> Tensor:
        maps = [images]
        for (kind, source, other), conv in zip(self.steps, self.convs, strict=True):
            if kind == "sum":
                maps.append(F.relu(maps[source] + maps[other]))
                continue
            made = conv(maps[source])
            if kind == "relu sum":
                made = made + maps[other]
            maps.append(made if kind == "conv" else F.relu(made))
        return sum(maps[k].mean((2, 3)) for k in sorted(self.read))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(24))
def test_fusing_changes_nothing_whoever_reads_whom(seed: int) -> None:
    torch.manual_seed(seed)
    model = Drawn(seed).double()
    frozen = FrozenNetwork(model, form="cudnn")
    assert_equal_to_rounding(frozen, model, torch.rand(2, 8, 4, 4, dtype=torch.float64))


class OwnCalls(nn.Module):
    """Convolutions that are called as functions, on weights of the network's own making."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.weight = nn.Parameter(torch.randn(8, 8, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        for call in (
            lambda x: F.conv2d(x, self.weight),
            lambda x: F.conv2d(x, self.weight * 2, None, (1, 1), (0, 0), (1, 1), 1),
            lambda x: F.conv2d(x, self.weight, None, (1, 1), (0, 0), (1, 1), 1),
            lambda x: F.conv2d(x, weight=self.weight, bias=None),
        ):
            maps = F.relu(self.convs[0](maps))
            maps = F.relu(self.convs[1](maps)) + call(maps)
        return maps.mean((2, 3))


def test_a_convolution_that_a_network_calls_itself_is_left_as_it_is_called() -> None:
    torch.manual_seed(0)
    model = OwnCalls().double()
    frozen = FrozenNetwork(model, form="cudnn")
    assert frozen.fused == 8
    assert_equal_to_rounding(frozen, model, torch.rand(2, 8, 4, 4, dtype=torch.float64))


class NamedInput(nn.Module):
    """Every module called with its input by name, or with its place."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.by_name = by_name
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut, self.nothing, self.relu = nn.Conv2d(8, 8, 1), nn.Identity(), nn.ReLU()
        self.bn, self.pool, self.fc = nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        def call(module: nn.Module, maps: Tensor) -> Tensor:
            made: Tensor = module(input=maps) if self.by_name else module(maps)
            return made

        maps = call(self.nothing, call(self.relu, call(self.first, images)))
        made = call(self.nothing, call(self.bn, call(self.second, maps)))
        maps = call(self.relu, made + call(self.shortcut, maps))
        return call(self.fc, call(self.pool, maps).flatten(1))


def test_modules_may_be_given_their_input_by_name() -> None:
    torch.manual_seed(0)
    model = NamedInput(by_name=True).double()
    with_statistics(model)
    frozen = FrozenNetwork(model, form="cudnn")
    model.by_name = False
    assert frozen.fused == FrozenNetwork(model, form="cudnn").fused > 1 and not frozen.unfolded
    assert_equal_to_rounding(frozen, model, torch.rand(2, 3, 8, 8, dtype=torch.float64))


class DataDependent(nn.Module):
    """Take another path for bright images, which no trace can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.bn(self.conv(images))
        return (maps if images.mean() > 0.5 else -maps).relu().mean((2, 3))


@pytest.mark.parametrize("form", ["eager", "cudnn"])
def test_a_network_that_cannot_be_traced_stays_as_it_is(form: Form) -> None:
    torch.manual_seed(0)
    model = DataDependent().double()
    with_statistics(model)
    frozen = FrozenNetwork(model, form=form)
    assert frozen.unfolded == ["bn"]
    assert frozen.fused == 0
    for brightness in (0.1, 0.9):
        images = torch.rand(2, 3, 6, 6, dtype=torch.float64) * 0.1 + brightness
        assert_equal_to_rounding(frozen, model, images)
    with torch.no_grad():
        model.conv.weight.mul_(2)
    frozen.refresh()
    assert_equal_to_rounding(frozen, model, images)


def test_the_compiled_gradient_follows_the_weights_without_compiling_again(
    compiled_graphs: list[torch.fx.GraphModule],
) -> None:
    model = trained("resnet8")
    frozen = FrozenNetwork(model, form="compiled")
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    labels = torch.tensor([1, 4])
    assert frozen.input_gradient is not None
    for _ in range(3):
        at = images.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(cross_entropy(model.eval()(at), labels), at)
        found = frozen.input_gradient(images, labels, cross_entropy)
        # As above: float64 through some ten layers.
        torch.testing.assert_close(
            found, wanted, rtol=1e-10, atol=1e-10 * float(wanted.abs().max())
        )
        with torch.no_grad():
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(1.1)
        frozen.refresh()
    (graph,) = compiled_graphs
    backward = torch.ops.aten.convolution_backward.default
    masks = [node.args[10] for node in graph.graph.nodes if node.target is backward]
    convs = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert masks == [[True, False, False]] * convs


def test_a_network_that_cannot_be_compiled_is_named_in_one_line() -> None:
    frozen = FrozenNetwork(DataDependent(), form="compiled")
    assert frozen.input_gradient is not None
    with pytest.raises(ValueError, match="--attack-form compiled: this network cannot be compiled"):
        frozen.input_gradient(torch.rand(2, 3, 6, 6), torch.tensor([1, 3]), cross_entropy)


def test_other_forms_leave_the_gradient_to_autograd() -> None:
    model = trained("resnet8")
    assert FrozenNetwork(model, form="eager").input_gradient is None
    assert FrozenNetwork(model, form="cudnn").input_gradient is None


class OneConvTwice(nn.Module):
    """A convolution of few channels in two places, one of which ends in ReLU and one in none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        maps = F.relu(self.conv(images)) + self.conv(images * 2)
        return (maps + F.relu(self.conv(images * 3))).mean((2, 3))  # type: ignore[no-any-return]


def test_a_padded_convolution_follows_its_weight_in_every_place() -> None:
    torch.manual_seed(0)
    model = OneConvTwice().double()
    frozen = FrozenNetwork(model, form="cudnn")
    assert frozen.fused == 2
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    for _ in range(2):
        assert_equal_to_rounding(frozen, model, images)
        with torch.no_grad():
            model.conv.weight.mul_(1.5)
        frozen.refresh()


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["eager", "compiled", "cudnn"])
@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_forms_agree_with_float64_on_a_gpu(name: str, form: Form) -> None:
    truth = trained(name).cuda().eval()
    model = trained(name, torch.float32).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(truth.state_dict())
    torch.backends.cudnn.allow_tf32 = False
    frozen = FrozenNetwork(model, form=form)
    images, labels = torch.rand(16, 3, 32, 32, device="cuda"), torch.arange(16, device="cuda") % 6
    at, low = images.double().requires_grad_(), images.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(cross_entropy(truth(at), labels), at)
    if frozen.input_gradient is not None:
        found = frozen.input_gradient(images, labels, cross_entropy)
    else:
        (found,) = torch.autograd.grad(cross_entropy(frozen(low), labels), low)
    # A ReLU whose input is zero up to float32 rounding may take the other side: few do, so the
    # bound is on the norm.
    assert float((found - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["eager", "compiled", "cudnn"])
def test_every_form_can_be_captured_with_its_refresh(form: Form) -> None:
    model = trained("resnet18", torch.float32).cuda().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    frozen = FrozenNetwork(model, torch.bfloat16, form)
    images, labels = torch.rand(16, 3, 32, 32, device="cuda"), torch.arange(16, device="cuda") % 6

    def gradient() -> Tensor:
        frozen.refresh()
        if frozen.input_gradient is not None:
            return frozen.input_gradient(images, labels, cross_entropy)
        at = images.clone().requires_grad_()
        return torch.autograd.grad(cross_entropy(frozen(at), labels), at)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            gradient()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = gradient()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    graph.replay()
    wanted = gradient()
    # The same kernels on the same numbers, but for the algorithms cuDNN may choose anew.
    assert float((captured - wanted).norm() / wanted.norm()) < 1e-2

"""Models: the official architectures and key names rebuilt from functions alone; the options."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reat_fast.models import NAMES, create_model, load_official
from reat_fast.networks import architectures
from reat_fast.networks.architectures import ConvBN, Network, PreActBlock, ResidualBlock

# blocks per stage, width used here, bottleneck
RESNETS = {
    "resnet18": ([2, 2, 2, 2], 4, False),
    "resnet34": ([3, 4, 6, 3], 4, False),
    "resnet50": ([3, 4, 6, 3], 4, True),
}
# blocks per stage, width used here: 16 is that of the stem, so that the first stage has no shortcut
WIDE_RESNETS = {"wrn28_10": ([4, 4, 4], 16), "wrn34_10": ([5, 5, 5], 8)}
OFFICIAL = [*RESNETS, *WIDE_RESNETS]
NUM_CLASSES, CHANNELS = 7, 2


def resnet_layers(
    blocks: list[int], width: int, bottleneck: bool, classes: int, channels: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, weight shape) of the layers of the official resnet.py, in its order."""
    expansion, in_width = (4, width) if bottleneck else (1, width)
    yield from conv_and_norm("conv1.0", "conv1.1", (width, channels, 3, 3))
    for stage, depth in enumerate(blocks):
        inner = width * 2**stage
        for index in range(depth):
            name, outer = f"layer{stage + 1}.{index}", inner * expansion
            residual = f"{name}.residual_function"
            if bottleneck:
                yield from conv_and_norm(f"{residual}.0", f"{residual}.1", (inner, in_width, 1, 1))
                yield from conv_and_norm(f"{residual}.3", f"{residual}.4", (inner, inner, 3, 3))
                yield from conv_and_norm(f"{residual}.6", f"{residual}.7", (outer, inner, 1, 1))
            else:
                yield from conv_and_norm(f"{residual}.0", f"{residual}.1", (inner, in_width, 3, 3))
                yield from conv_and_norm(f"{residual}.3", f"{residual}.4", (inner, inner, 3, 3))
            if in_width != outer:
                shortcut = f"{name}.shortcut"
                yield from conv_and_norm(f"{shortcut}.0", f"{shortcut}.1", (outer, in_width, 1, 1))
            in_width = outer
    yield "fc", (classes, in_width)


def wide_resnet_layers(
    blocks: list[int], width: int, classes: int, channels: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield (name, weight shape) of the layers of the official wrn.py, in its order."""
    yield "conv1", (16, channels, 3, 3)
    in_width = 16
    for stage, depth in enumerate(blocks):
        out_width = width * 2**stage
        for index in range(depth):
            name = f"block{stage + 1}.layer.{index}"
            yield f"{name}.bn1", (in_width,)
            yield from conv_and_norm(f"{name}.conv1", f"{name}.bn2", (out_width, in_width, 3, 3))
            yield f"{name}.conv2", (out_width, out_width, 3, 3)
            if in_width != out_width:
                yield f"{name}.convShortcut", (out_width, in_width, 1, 1)
            in_width = out_width
    yield "bn1", (in_width,)
    yield "fc", (classes, in_width)


def conv_and_norm(
    conv: str, norm: str, shape: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield conv, shape
    yield norm, shape[:1]


def official_layers(name: str) -> list[tuple[str, tuple[int, ...]]]:
    if name in RESNETS:
        return list(resnet_layers(*RESNETS[name], NUM_CLASSES, CHANNELS))
    return list(wide_resnet_layers(*WIDE_RESNETS[name], NUM_CLASSES, CHANNELS))


def official_state(name: str) -> dict[str, Tensor]:
    """Draw a float64 state dict under the official key names, no two tensors alike."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    for position, (layer, shape) in enumerate(official_layers(name)):
        uniform = torch.rand(4, shape[0], generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            state[f"{layer}.weight"] = 0.5 + uniform[0]
            state[f"{layer}.bias"] = uniform[1] - 0.5
            state[f"{layer}.running_mean"] = uniform[2] - 0.5
            state[f"{layer}.running_var"] = 0.5 + uniform[3]
            state[f"{layer}.num_batches_tracked"] = torch.tensor(position)
        else:
            weight = torch.randn(shape, generator=generator, dtype=torch.float64)
            state[f"{layer}.weight"] = weight / math.sqrt(math.prod(shape[1:]))
            if layer == "fc":
                state["fc.bias"] = uniform[0]
    return state


def official_forward(
    name: str, state: dict[str, Tensor], images: Tensor, training: bool
) -> tuple[Tensor, Tensor]:
    """Return features and logits by functions over the official key names."""

    def conv(layer: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{layer}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(layer: str, x: Tensor) -> Tensor:
        mean, variance = state[f"{layer}.running_mean"], state[f"{layer}.running_var"]
        weight, bias = state[f"{layer}.weight"], state[f"{layer}.bias"]
        return F.batch_norm(x, mean.clone(), variance.clone(), weight, bias, training)

    def post_activation(block: str, x: Tensor, stride: int) -> Tensor:
        residual, shortcut = f"{block}.residual_function", x
        if f"{residual}.6.weight" in state:
            y = F.relu(norm(f"{residual}.1", conv(f"{residual}.0", x)))
            y = F.relu(norm(f"{residual}.4", conv(f"{residual}.3", y, stride)))
            y = norm(f"{residual}.7", conv(f"{residual}.6", y))
        else:
            y = F.relu(norm(f"{residual}.1", conv(f"{residual}.0", x, stride)))
            y = norm(f"{residual}.4", conv(f"{residual}.3", y))
        if f"{block}.shortcut.0.weight" in state:
            shortcut = norm(f"{block}.shortcut.1", conv(f"{block}.shortcut.0", x, stride))
        return F.relu(y + shortcut)

    def pre_activation(block: str, x: Tensor, stride: int) -> Tensor:
        active, shortcut = F.relu(norm(f"{block}.bn1", x)), x
        y = F.relu(norm(f"{block}.bn2", conv(f"{block}.conv1", active, stride)))
        if f"{block}.convShortcut.weight" in state:
            shortcut = conv(f"{block}.convShortcut", active, stride)
        return shortcut + conv(f"{block}.conv2", y)

    if name in RESNETS:
        maps = F.relu(norm("conv1.1", conv("conv1.0", images)))
        for stage, depth in enumerate(RESNETS[name][0]):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                maps = post_activation(f"layer{stage + 1}.{index}", maps, stride)
    else:
        maps = conv("conv1", images)
        for stage, depth in enumerate(WIDE_RESNETS[name][0]):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                maps = pre_activation(f"block{stage + 1}.layer.{index}", maps, stride)
        maps = F.relu(norm("bn1", maps))
    features = F.adaptive_avg_pool2d(maps, 1).flatten(1)
    return features, F.linear(features, state["fc.weight"], state["fc.bias"])


def narrow(name: str, **options: Any) -> Network:
    """Create the network at the width of the tables above, 4 if it has no official form."""
    width = (RESNETS | WIDE_RESNETS)[name][1] if name in OFFICIAL else 4
    return create_model(name, NUM_CLASSES, in_channels=CHANNELS, width=width, **options)


def randomised(name: str, **options: Any) -> Network:
    """Create a narrow float64 network whose BatchNorms are not the identity, in eval mode."""
    torch.manual_seed(0)
    network = narrow(name, **options).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.running_mean = torch.rand(module.num_features, dtype=torch.float64) - 0.5
            module.running_var = torch.rand(module.num_features, dtype=torch.float64) + 0.5
    return network


def draw_images(height: int = 12, width: int = 12, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, CHANNELS, height, width, generator=generator, dtype=torch.float64)


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    # Both sides sum the same float64 terms, a few hundred in one, in another order, layer by layer:
    # 1e-12 of values near 1 is 4,500 roundings.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", OFFICIAL)
def test_official_weights_give_the_official_features_logits_and_gradients(
    name: str, training: bool
) -> None:
    state = official_state(name)
    network = narrow(name).double().train(training)
    load_official(network, state)
    images, same_images = draw_images().requires_grad_(), draw_images().requires_grad_()
    features, logits = network.forward_features_logits(images)
    true_features, true_logits = official_forward(name, state, same_images, training)
    assert_exact(features, true_features)
    assert_exact(logits, true_logits)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    (true_gradient,) = torch.autograd.grad(true_logits.square().sum(), same_images)
    scale = true_gradient.abs().max()
    assert_exact(gradient / scale, true_gradient / scale)


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_tensor_arrives_once(name: str) -> None:
    state = official_state(name)
    network = narrow(name).double()
    load_official(network, state)
    own = sorted(tensor.numpy().tobytes() for tensor in network.state_dict().values())
    assert own == sorted(tensor.numpy().tobytes() for tensor in state.values())


@pytest.mark.parametrize("name", OFFICIAL)
def test_equal_seeds_give_the_initial_weights_of_the_official_order(name: str) -> None:
    layers = official_layers(name)
    torch.manual_seed(5)
    built: dict[str, nn.Module] = {}
    for layer, shape in layers:
        if len(shape) == 4:
            built[layer] = nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
        else:
            built[layer] = (
                nn.Linear(shape[1], shape[0]) if layer == "fc" else nn.BatchNorm2d(shape[0])
            )
    if name in WIDE_RESNETS:
        for layer, shape in layers:
            weight = built[layer].weight
            assert isinstance(weight, nn.Parameter)
            if len(shape) == 4:
                nn.init.normal_(weight, 0.0, math.sqrt(2 / (shape[0] * shape[2] * shape[3])))
        nn.init.zeros_(built["fc"].get_parameter("bias"))
    expected = narrow(name)
    load_official(
        expected,
        {f"{n}.{k}": t for n, module in built.items() for k, t in module.state_dict().items()},
    )
    torch.manual_seed(5)
    for key, tensor in narrow(name).state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet18", 11_173_962),
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("wrn28_10", 36_479_194),
        ("wrn34_10", 46_160_474),
        # The usual count without the last BatchNorm, and that BatchNorm.
        ("preact_resnet18", 11_171_146 + 2 * 512),
    ],
)
def test_parameter_counts_are_the_known_ones(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = create_model(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize("size", [(28, 28), (17, 9), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_linear_layer_of_the_features_at_any_size(
    name: str, size: tuple[int, int]
) -> None:
    network, images = randomised(name), draw_images(*size, count=2)
    features, logits = network.forward_features_logits(images)
    assert features.shape == (2, network.fc.in_features)
    assert logits.shape == (2, NUM_CLASSES)
    assert torch.equal(logits, network.fc(features))
    assert torch.equal(logits, network(images))
    assert torch.equal(features, network.forward_features(images))


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_gives_the_same_logits(name: str) -> None:
    network, images = randomised(name), draw_images()
    logits = network(images)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's own stub
    images = images.contiguous(memory_format=torch.channels_last)
    assert_exact(network(images), logits)


@pytest.mark.parametrize("name", NAMES)
def test_each_convbn_folds_into_one_convolution(name: str) -> None:
    network, images = randomised(name), draw_images()
    logits = network(images)
    for module in network.modules():
        if isinstance(module, ConvBN):
            conv, bn = module.conv, module.bn
            assert bn.running_var is not None and bn.running_mean is not None
            scale = bn.weight / (bn.running_var + bn.eps).sqrt()
            conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None])
            conv.bias = nn.Parameter(bn.bias - bn.running_mean * scale)
            module.bn = nn.Identity()  # type: ignore[assignment]  # what is left after folding
    assert_exact(network(images), logits)
    left = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    before_activation = sum(isinstance(module, PreActBlock) for module in network.modules())
    assert left == (before_activation + 1 if before_activation else 0)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_leave_their_input_unchanged(name: str) -> None:
    # In eval mode without gradients, where an activation in place would go unnoticed by autograd.
    for module in randomised(name).modules():
        if isinstance(module, (ResidualBlock, PreActBlock)):
            in_width = next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
            maps = torch.randn(1, in_width, 4, 4, dtype=torch.float64)
            before = maps.clone()
            with torch.no_grad():
                module(maps)
            assert torch.equal(maps, before)


@pytest.mark.parametrize("name", NAMES)
def test_stem_stride_halves_the_image(name: str) -> None:
    images = draw_images(32, 20)
    for stride in (1, 2):
        maps = narrow(name, stem_stride=stride).double().get_submodule("stem")(images)
        assert maps.shape[2:] == (32 // stride, 20 // stride)
    default = narrow(name).double().get_submodule("stem")(images)
    assert default.shape[2:] == ((16, 10) if name == "resnet8" else (32, 20))


def test_official_checkpoints_of_data_parallel_models_load() -> None:
    state, plain, wrapped = official_state("resnet18"), narrow("resnet18"), narrow("resnet18")
    load_official(plain, state)
    checkpoint = {"epoch": 3, "state_dict": {f"module.{key}": state[key] for key in state}}
    load_official(wrapped, checkpoint)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, wrapped.state_dict()[key])


def test_a_missing_a_left_over_and_a_misshapen_tensor_are_named_and_nothing_is_copied() -> None:
    network, state = narrow("wrn28_10"), official_state("wrn28_10")
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    del state["block1.layer.0.bn1.weight"]
    state["block9.weight"] = torch.zeros(1)
    state["fc.bias"] = torch.zeros(99)
    with pytest.raises(ValueError) as error:
        load_official(network, state)
    assert "missing: block1.layer.0.bn1.weight;" in str(error.value)
    assert "left over: block9.weight;" in str(error.value)
    assert f"wrong shape: fc.bias [99] instead of [{NUM_CLASSES}];" in str(error.value)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key])


def test_weights_of_another_model_name_the_model_that_fits() -> None:
    shapes = dict(resnet_layers([3, 4, 6, 3], 64, True, 100, 3))
    state = {f"{layer}.weight": torch.empty(shape) for layer, shape in shapes.items()}
    for layer, shape in shapes.items():
        if len(shape) == 1:
            for entry in ("bias", "running_mean", "running_var"):
                state[f"{layer}.{entry}"] = torch.empty(shape)
            state[f"{layer}.num_batches_tracked"] = torch.tensor(0)
    state["fc.bias"] = torch.empty(100)
    with pytest.raises(ValueError, match=r"fit create_model\('resnet50', 100, in_channels=3\)"):
        load_official(narrow("resnet18"), state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(1)}, "not the key names of the official"),
        (official_state("resnet18"), "fit none of"),
        ({}, "not a state dict"),
        ({"epoch": 3}, "not a state dict"),
        ({"state_dict": None}, "not a state dict"),
    ],
)
def test_weights_of_no_known_model_say_so(state: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_official(narrow("resnet34"), state)


def test_official_weights_do_not_fit_a_foreign_module() -> None:
    with pytest.raises(ValueError, match=r"resnet18.*not Linear"):
        load_official(nn.Linear(2, 2), official_state("resnet18"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet19", {}, "unknown model 'resnet19'; choose one of resnet8, resnet18"),
        ("resnet18", {"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ("resnet18", {"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ("resnet18", {"width": 0}, "width must be a whole number, 1 or more, got 0"),
        ("resnet8", {"width": 1.5}, "width must be a whole number, 1 or more, got 1.5"),
        ("resnet18", {"stem_stride": 3}, "stem_stride must be 1 or 2, got 3"),
        ("resnet18", {"small_stem": True}, "resnet18 has no option small_stem"),
        ("resnet18", {"drop_rate": 0.1}, "resnet18 has no option drop_rate"),
        ("timm/resnet18", {"width": 8}, "timm/resnet18 has no option width, which .*; leave"),
        ("timm/resnet18", {"width": 0}, "width must be a whole number|has no option width"),
        ("timm/resnet18", {"stem_stride": 2}, "has no option stem_stride, which resnet8"),
    ],
)
def test_bad_arguments_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_timm_missing_says_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install 'reat-fast\[timm\]'"):
        create_model("timm/resnet18")


def test_the_file_of_architectures_needs_torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(architectures.__file__).read_text("utf-8")
    for name in [name for name in sys.modules if name.partition(".")[0] == "reat_fast"]:
        monkeypatch.setitem(sys.modules, name, None)  # any import of it fails
    alone = ModuleType("alone")
    exec(source, vars(alone))
    network = alone.ResNet((1, 1, 1), 8, 5, 3, stem_stride=2, first_stride=2)
    network.load_state_dict(create_model("resnet8", 5, width=8).state_dict())

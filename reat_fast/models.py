"""Models by name, and the weights of the official REAT code put into them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reat_fast.cli.terminal import first_line, some
from reat_fast.networks.architectures import (
    ConvBN,
    Network,
    PreActBlock,
    PreActResNet,
    ResidualBlock,
    ResNet,
    TimmNetwork,
)

_WideResNet = partial(PreActResNet, width=160, stem_width=16, he_init=True, stem_stride=1)
_NETWORKS: dict[str, Callable[..., Network]] = {
    "resnet8": partial(ResNet, (1, 1, 1), width=24, stem_stride=2, first_stride=2),
    "resnet18": partial(ResNet, (2, 2, 2, 2), width=64, stem_stride=1),
    "resnet34": partial(ResNet, (3, 4, 6, 3), width=64, stem_stride=1),
    "resnet50": partial(ResNet, (3, 4, 6, 3), width=64, stem_stride=1, bottleneck=True),
    "preact_resnet18": partial(PreActResNet, (2, 2, 2, 2), width=64, stem_stride=1),
    "wrn28_10": partial(_WideResNet, (4, 4, 4)),
    "wrn34_10": partial(_WideResNet, (5, 5, 5)),
}
NAMES = tuple(_NETWORKS)


def create_model(
    name: str,
    num_classes: int = 10,
    *,
    in_channels: int = 3,
    width: int | None = None,
    stem_stride: int | None = None,
    small_stem: bool = False,
    **timm_options: Any,
) -> Network:
    """Build an untrained network by name: one of NAMES, or "timm/<name>".

    It takes images [B, in_channels, H, W] in [0, 1] of any size. resnet18 to 50 and the WideResNets
    are those of the official code, equal seeds giving equal weights; preact_resnet18 ends in the
    BatchNorm and ReLU usual in adversarial training; resnet8, three blocks that each halve the
    image, is for quick runs on a CPU.

    width: channels of the first stage; default 24 in resnet8, 160 in WideResNets, else 64.
    stem_stride: 1, or 2 to halve the image at once; default 2 in resnet8, else 1.
    small_stem: for timm's ResNets, start with a 3x3 convolution of stride 1 and no max-pooling.
    timm_options: passed to timm.create_model.

    Raises ValueError for an unknown name, an option the network does not have, or timm missing.
    """
    for argument, value in (("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{argument} must be at least 1, got {value}")
    if name.startswith("timm/"):
        given = {"width": width, "stem_stride": stem_stride}
        if options := [option for option, value in given.items() if value is not None]:
            known = f"which {', '.join(NAMES)} have; leave it out"
            raise ValueError(f"{name} has no option {', '.join(options)}, {known}")
        return _create_timm(name, num_classes, in_channels, small_stem, timm_options)
    if name not in _NETWORKS:
        raise ValueError(f"unknown model {name!r}; choose one of {', '.join(NAMES)} or timm/<name>")
    if small_stem or timm_options:
        options = [*timm_options, *(["small_stem"] if small_stem else [])]
        raise ValueError(f"{name} has no option {', '.join(options)}; it takes width, stem_stride")
    shape = _shape_options(width, stem_stride)
    return _NETWORKS[name](num_classes=num_classes, in_channels=in_channels, **shape)


def refuse_other_size(network: nn.Module, name: str, shape: Sequence[int]) -> None:
    """Refuse images that a network which was just made cannot compute with.

    shape: [H, W, C]. Raises ValueError with the network's own first line.
    """
    height, width, channels = shape
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, channels, height, width))
    except Exception as error:  # whatever the code of a network of timm makes of them
        reason = first_line(error)
        raise ValueError(
            f"--model {name}: takes no images of {height} x {width} pixels ({reason:.100}); name "
            "another, or for image files an --image-size that it takes"
        ) from error
    network.train()


def load_official(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Copy weights saved by the official REAT code (resnet.py, wrn.py) into a created model.

    state_dict: tensors under the official key names, with or without DataParallel's "module.", or
    the official checkpoint that holds them as "state_dict". Every tensor of either side must find
    its partner; otherwise nothing is copied.

    Raises ValueError naming missing and left-over keys, wrong shapes and the model that would fit.
    """
    given = _official_state(state_dict)
    own = _official_tensors(model)
    faults = {
        "missing": sorted(own.keys() - given.keys()),
        "left over": sorted(given.keys() - own.keys()),
        "wrong shape": [
            f"{key} {list(given[key].shape)} instead of {list(tensor.shape)}"
            for key, tensor in own.items()
            if key in given and given[key].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        raise ValueError(
            "the official weights do not fit this model: "
            + "; ".join(f"{kind}: {some(keys)}" for kind, keys in faults.items() if keys)
            + f"; {_fitting_model(given)}"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(given[key])


def _shape_options(width: int | None, stem_stride: int | None) -> dict[str, int]:
    if width is not None and not (isinstance(width, int) and width >= 1):
        raise ValueError(f"width must be a whole number, 1 or more, got {width}")
    if stem_stride not in (None, 1, 2):
        raise ValueError(f"stem_stride must be 1 or 2, got {stem_stride}")
    given = {"width": width, "stem_stride": stem_stride}
    return {option: value for option, value in given.items() if value is not None}


def _create_timm(
    name: str, num_classes: int, in_channels: int, small_stem: bool, options: dict[str, Any]
) -> Network:
    try:
        timm: Any = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision for another torch: RuntimeError
        raise ValueError(
            f"{name} needs timm and the torchvision of this torch ({error}): "
            "pip install 'reat-fast[timm]', torchvision from the index that torch came from"
        ) from None
    timm_name = name.removeprefix("timm/")
    if not timm.is_model(timm_name):
        raise ValueError(f"timm has no model {timm_name!r}; timm.list_models() has the names")
    backbone = timm.create_model(
        timm_name, num_classes=num_classes, in_chans=in_channels, **options
    )
    if not isinstance(backbone.get_classifier(), nn.Linear):
        raise ValueError(f"{name} does not end in one linear layer; choose another timm model")
    if small_stem:
        conv = getattr(backbone, "conv1", None)
        if not isinstance(conv, nn.Conv2d) or not hasattr(backbone, "maxpool"):
            raise ValueError(f"{name} has no conv1 and maxpool to replace; leave small_stem off")
        backbone.conv1 = nn.Conv2d(in_channels, conv.out_channels, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return TimmNetwork(backbone)


def _official_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{prefix}.{name}": tensor
        for prefix, module in _official_modules(model)
        for name, tensor in module.state_dict().items()
    }


def _official_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, ResNet):
        yield from _pair("conv1.0", "conv1.1", model.stem)
        for name, block in _official_blocks(model.stages, "layer{}.{}"):
            assert isinstance(block, ResidualBlock)
            for index, unit in enumerate(block.residual):
                # The official Sequential is conv, bn, relu, conv, bn, ...
                position = f"{name}.residual_function."
                yield from _pair(f"{position}{3 * index}", f"{position}{3 * index + 1}", unit)
            if isinstance(block.shortcut, ConvBN):
                yield from _pair(f"{name}.shortcut.0", f"{name}.shortcut.1", block.shortcut)
    elif isinstance(model, PreActResNet):
        yield "conv1", model.stem
        for name, block in _official_blocks(model.stages, "block{}.layer.{}"):
            assert isinstance(block, PreActBlock)
            yield f"{name}.bn1", block.bn
            yield from _pair(f"{name}.conv1", f"{name}.bn2", block.conv_bn)
            yield f"{name}.conv2", block.conv
            if block.shortcut is not None:
                yield f"{name}.convShortcut", block.shortcut
        yield "bn1", model.bn
    else:
        kind = type(model).__name__
        raise ValueError(f"official weights fit models of {', '.join(NAMES)}, not {kind}")
    yield "fc", model.fc


def _official_blocks(stages: nn.Sequential, template: str) -> Iterator[tuple[str, nn.Module]]:
    for stage, blocks in enumerate(stages, start=1):
        assert isinstance(blocks, nn.Sequential)
        for index, block in enumerate(blocks):
            yield template.format(stage, index), block


def _pair(conv: str, bn: str, unit: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    assert isinstance(unit, ConvBN)
    yield conv, unit.conv
    yield bn, unit.bn


def _official_state(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    whole = state_dict if isinstance(state_dict, Mapping) else {}
    state = whole.get("state_dict", whole)
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError("not a state dict: expected tensors by name, or {'state_dict': ...}")
    if all(key.startswith("module.") for key in state):
        return {key.removeprefix("module."): tensor for key, tensor in state.items()}
    return dict(state)


def _fitting_model(given: dict[str, Tensor]) -> str:
    stem = given.get("conv1.0.weight", given.get("conv1.weight"))
    fc = given.get("fc.weight")
    if stem is None or fc is None or stem.ndim != 4:
        return "these are not the key names of the official resnet.py or wrn.py"
    num_classes, in_channels = len(fc), stem.shape[1]
    shapes = {key: tensor.shape for key, tensor in given.items()}
    for name in NAMES:
        with torch.device("meta"):
            candidate = create_model(name, num_classes, in_channels=in_channels)
        if shapes == {key: tensor.shape for key, tensor in _official_tensors(candidate).items()}:
            return f"they fit create_model({name!r}, {num_classes}, in_channels={in_channels})"
    return f"they fit none of {', '.join(NAMES)} as created by default"

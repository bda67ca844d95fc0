"""The architectures: ResNet, pre-activation ResNet (WideResNet is one) and a wrapper for timm.

They take images in [0, 1] without normalisation and give features beside logits. A BatchNorm that
follows a convolution stands with it in one ConvBN; the others follow a sum. ReLU is never in place.
Modules are built and initialised in the order of the official code, so equal seeds give equal
weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class Network(nn.Module):
    """Give logits and, beside them, the features the last linear layer `fc` sees."""

    fc: nn.Linear

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features [B, D] of images [B, C, H, W] in [0, 1]."""
        raise NotImplementedError  # each architecture has its own

    def forward_features_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [B, D] and the logits [B, K] of images [B, C, H, W] in [0, 1]."""
        features = self.forward_features(images)
        return features, self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, K] of images [B, C, H, W] in [0, 1]."""
        return self.forward_features_logits(images)[1]


class ConvBN(nn.Module):
    """Convolve without bias, padded to keep the size, then normalise."""

    def __init__(self, in_width: int, out_width: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = _conv(in_width, out_width, kernel, stride)
        self.bn = nn.BatchNorm2d(out_width)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.bn(self.conv(x))
        return output


class ResidualBlock(nn.Module):
    """Compute relu(residual(x) + shortcut(x)), residual 3x3-3x3 or, as bottleneck, 1x1-3x3-1x1."""

    def __init__(self, in_width: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out_width = 4 * width if bottleneck else width
        if bottleneck:
            units = [
                ConvBN(in_width, width, 1),
                ConvBN(width, width, 3, stride),
                ConvBN(width, out_width, 1),
            ]
        else:
            units = [ConvBN(in_width, width, 3, stride), ConvBN(width, width, 3)]
        self.residual = nn.ModuleList(units)
        self.shortcut: ConvBN | nn.Identity = nn.Identity()
        if stride != 1 or in_width != out_width:
            self.shortcut = ConvBN(in_width, out_width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        output = x
        for index, unit in enumerate(self.residual):
            output = unit(F.relu(output) if index else output)
        return F.relu(output + self.shortcut(x))


class ResNet(Network):
    """Classify small images: 3x3 stem without pooling, then stages of residual blocks.

    blocks: number per stage. width, first_stride: channels and stride of the first stage; each
    later one halves the image and doubles the width. Source: official resnet.py.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        num_classes: int,
        in_channels: int,
        stem_stride: int,
        bottleneck: bool = False,
        first_stride: int = 1,
    ) -> None:
        super().__init__()
        self.stem = ConvBN(in_channels, width, 3, stem_stride)
        widths, expansion = _widths(blocks, width), 4 if bottleneck else 1
        block = partial(ResidualBlock, bottleneck=bottleneck)
        self.stages = _stages(block, blocks, width, widths, expansion, first_stride)
        self.fc = nn.Linear(widths[-1] * expansion, num_classes)

    def forward_features(self, images: Tensor) -> Tensor:
        return _global_mean(self.stages(F.relu(self.stem(images))))


class PreActBlock(nn.Module):
    """Compute x + conv(relu(conv_bn(a))), a = relu(bn(x)); a new shape takes shortcut(a) for x."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_width)
        self.conv_bn = ConvBN(in_width, width, 3, stride)
        self.conv = _conv(width, width, 3)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_width != width:
            self.shortcut = _conv(in_width, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn(x))
        residual: Tensor = self.conv(F.relu(self.conv_bn(active)))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet(Network):
    """Classify small images by pre-activation blocks, a last BatchNorm and ReLU before pooling.

    blocks, width: as in ResNet. stem_width: None for that of the first stage. he_init: weights of
    convolutions from N(0, 2 / fan-out) and zero bias in place of PyTorch's own. Source: official
    wrn.py, a WideResNet: stem_width 16 and he_init.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        num_classes: int,
        in_channels: int,
        stem_stride: int,
        stem_width: int | None = None,
        he_init: bool = False,
    ) -> None:
        super().__init__()
        in_width = stem_width or width
        self.stem = _conv(in_channels, in_width, 3, stem_stride)
        widths = _widths(blocks, width)
        self.stages = _stages(PreActBlock, blocks, in_width, widths)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        if he_init:
            _he_init_(self)

    def forward_features(self, images: Tensor) -> Tensor:
        return _global_mean(F.relu(self.bn(self.stages(self.stem(images)))))


class TimmNetwork(Network):
    """Give a timm model the interface of this module; its last layer must be one nn.Linear."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone

    @property
    def fc(self) -> nn.Linear:  # type: ignore[override]  # a second name in the state dict otherwise
        classifier: nn.Linear = self.backbone.get_classifier()
        return classifier

    def forward_features(self, images: Tensor) -> Tensor:
        maps = self.backbone.forward_features(images)
        features: Tensor = self.backbone.forward_head(maps, pre_logits=True)
        return features


def _conv(in_width: int, out_width: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_width, out_width, kernel, stride, padding=kernel // 2, bias=False)


def _stages(
    block: Callable[[int, int, int], nn.Module],
    blocks: Sequence[int],
    in_width: int,
    widths: list[int],
    expansion: int = 1,
    first_stride: int = 1,
) -> nn.Sequential:
    stages, stride = nn.Sequential(), first_stride
    for depth, width in zip(blocks, widths, strict=True):
        stage = nn.Sequential()
        for index in range(depth):
            stage.append(block(in_width, width, 1 if index else stride))
            in_width = width * expansion
        stages.append(stage)
        stride = 2
    return stages


def _widths(blocks: Sequence[int], width: int) -> list[int]:
    return [width * 2**stage for stage in range(len(blocks))]


def _global_mean(maps: Tensor) -> Tensor:
    # AdaptiveAvgPool2d has the same value but no deterministic backward on CUDA.
    return maps.mean((2, 3))


def _he_init_(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

"""pytest bench/bench_cpu_convolutions.py --benchmark-only: own forms of the attacked network.

Layers of ResNet-18 and WideResNet-28-10, PyTorch's convolution beside F(2x2, 3x3), whose input
gradient is the same computation: LEAST_CHANNELS of kernels/winograd.py is where it begins to win.
Then the input gradient of first convolutions, PyTorch's beside kernels/image_gradient.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional as F

from reat_fast.engine.memory import keep_freed_memory
from reat_fast.kernels.image_gradient import image_gradient
from reat_fast.kernels.winograd import transform_weight_, winograd_conv

# images, channels, height and width
LAYERS = [(128, 64, 32), (128, 128, 16), (128, 256, 8), (128, 512, 4)]
LAYERS += [(32, 160, 32), (32, 320, 16), (32, 640, 8)]

# images, input and output channels, height and width, kernel; stride 2
STEMS = [(128, 1, 24, 28, 3), (128, 3, 24, 32, 3), (32, 3, 64, 64, 7)]


@pytest.mark.parametrize("form", ["conv2d", "winograd"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}x{s[2]}")
def test_convolution(benchmark: BenchmarkFixture, layer: tuple[int, int, int], form: str) -> None:
    images, channels, size = layer
    x, weight = _channels_last(images, channels, size), _channels_last(channels, channels, 3)
    bias, transformed = torch.randn(channels), torch.empty(16, channels, channels)
    transform_weight_(transformed, weight)
    ours = partial(winograd_conv, x, transformed, bias)
    _time(benchmark, ours if form == "winograd" else partial(F.conv2d, x, weight, bias, padding=1))


@pytest.mark.parametrize("form", ["pytorch", "col2im"])
@pytest.mark.parametrize("stem", STEMS, ids=lambda s: f"{s[0]}x{s[1]}x{s[3]}x{s[3]}-to-{s[2]}")
def test_image_gradient(benchmark: BenchmarkFixture, stem: tuple[int, ...], form: str) -> None:
    images, inputs, outputs, size, kernel = stem
    x, weight = _channels_last(images, inputs, size), _channels_last(outputs, inputs, kernel)
    padding = kernel // 2
    gradient = torch.randn_like(F.conv2d(x, weight, stride=2, padding=padding))

    def pytorch() -> Tensor:
        backward = torch.ops.aten.convolution_backward
        geometry = ([2, 2], [padding, padding], [1, 1], False, [0, 0], 1)
        found: Tensor = backward(gradient, x, weight, None, *geometry, [True, False, False])[0]
        return found

    def col2im() -> Tensor:
        found = image_gradient(gradient, weight, (size, size), (2, 2), (padding, padding))
        return found.contiguous(memory_format=torch.channels_last)

    _time(benchmark, col2im if form == "col2im" else pytorch)


def _channels_last(rows: int, channels: int, size: int) -> Tensor:
    return torch.randn(rows, channels, size, size).to(memory_format=torch.channels_last)


def _time(benchmark: BenchmarkFixture, call: Callable[[], Tensor]) -> None:
    keep_freed_memory()  # as training has it
    benchmark.pedantic(call, rounds=9, warmup_rounds=2)

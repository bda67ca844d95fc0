"""pytest bench/bench_winograd.py --benchmark-only: 3x3 convolutions with fewer products on a CPU.

One layer of ResNet-18 or WideResNet-28-10 at a time, PyTorch's convolution beside F(2x2, 3x3).
LEAST_CHANNELS of kernels/winograd.py is where the second begins to win. Input gradients are the
same computation and take as long.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.nn import functional as F

from reat_fast.kernels.winograd import transform_weight_, winograd_conv
from reat_fast.memory import keep_freed_memory

# images, channels, height and width
LAYERS = [(128, 64, 32), (128, 128, 16), (128, 256, 8), (128, 512, 4)]
LAYERS += [(32, 160, 32), (32, 320, 16), (32, 640, 8)]


@pytest.mark.parametrize("form", ["conv2d", "winograd"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda s: f"{s[0]}x{s[1]}x{s[2]}x{s[2]}")
def test_convolution(benchmark: BenchmarkFixture, layer: tuple[int, int, int], form: str) -> None:
    images, channels, size = layer
    x = torch.randn(images, channels, size, size).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(memory_format=torch.channels_last)
    bias = torch.randn(channels)
    transformed = weight.new_empty(16, channels, channels)
    transform_weight_(transformed, weight)
    benchmark.extra_info["gflop"] = 18e-9 * images * size**2 * channels**2
    keep_freed_memory()  # as training has it
    if form == "conv2d":
        call = partial(F.conv2d, x, weight, bias, padding=1)
    else:
        call = partial(winograd_conv, x, transformed, bias)
    benchmark.pedantic(call, rounds=9, warmup_rounds=2)

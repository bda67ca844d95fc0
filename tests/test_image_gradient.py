"""The gradient of the images by a product and a scatter equals PyTorch's."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from test_frozen import assert_equal_to_rounding, with_statistics
from test_winograd import outcome
from torch import nn

from reat_fast.kernels import image_gradient
from reat_fast.kernels.image_gradient import ImageConv2d, use_col2im_
from reat_fast.models import create_model
from reat_fast.networks.frozen import FrozenNetwork

# input and output channels, kernel, stride, padding, height, width
CASES = [
    (1, 8, 3, 2, 1, 8, 8),
    (1, 5, 3, 2, 1, 7, 9),
    (3, 4, 7, 2, 3, 15, 12),
    (1, 3, 4, 4, 0, 8, 9),  # patches, and pixels that none holds
    (2, 3, (7, 8), (3, 2), (2, 0), 9, 11),
    (1, 1, 1, 2, 0, 1, 1),
]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradient_are_those_of_conv2d(
    case: tuple[int, ...], layout: torch.memory_format, bias: bool
) -> None:
    inputs, outputs, kernel, stride, padding, height, width = case
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=bias)
    plain = nn.Sequential(conv.double().requires_grad_(False))
    quick = copy.deepcopy(plain)
    assert use_col2im_(quick) == [quick[0]]
    x = torch.randn(2, inputs, height, width, dtype=torch.float64).to(memory_format=layout)
    found, wanted = outcome(quick, x), outcome(plain, x)
    assert torch.equal(found[0], wanted[0]) and found[1].is_contiguous(memory_format=layout)
    # Sums of at most 49 products per pixel; float64 rounds by 1e-16.
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-12, atol=1e-13)


def test_only_convolutions_that_gain_by_it_change() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2),
        nn.Conv2d(3, 8, 7, 2),
        nn.Conv2d(3, 8, 3, 2),
        nn.Conv2d(1, 8, 3),
        nn.Conv2d(8, 8, 7, 2),
        nn.Conv2d(4, 8, 7, 2, groups=2),
        nn.Conv2d(1, 8, 3, 2, dilation=2),
        nn.Conv2d(1, 8, 3, 2, padding=1, padding_mode="reflect"),
        nn.Conv2d(1, 8, 3, (2, 1)),
        nn.Conv2d(1, 8, 3, 2, padding="valid"),
        nn.Conv2d(5, 8, 7, 2),
        nn.Conv2d(4, 8, 7, 2),
    ).requires_grad_(False)
    assert use_col2im_(network) == [network[0], network[1], network[-1]]


def test_no_gradient_costs_nothing() -> None:
    network = nn.Sequential(nn.Conv2d(1, 8, 3, 2)).requires_grad_(False)
    use_col2im_(network)
    with mock.patch.object(image_gradient._Convolve, "apply", side_effect=AssertionError):
        network(torch.rand(2, 1, 8, 8))
        with torch.no_grad():
            network(torch.rand(2, 1, 8, 8).requires_grad_())


def test_weights_that_ask_for_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="0: its weights ask for a gradient"):
        use_col2im_(nn.Sequential(nn.Conv2d(1, 8, 3, 2)))


def test_a_frozen_network_uses_it_and_equals_the_network() -> None:
    model = create_model("resnet8", 6, in_channels=1, width=8).double()
    with_statistics(model)
    frozen = FrozenNetwork(model, form="cpu")
    assert [type(m) for m in frozen._copy.modules()].count(ImageConv2d) == 1
    assert_equal_to_rounding(frozen, model, torch.rand(3, 1, 16, 16, dtype=torch.float64))

"""The convolution with fewer products equals PyTorch's, forward and input gradient."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from test_frozen import assert_equal_to_rounding, trained, with_statistics
from torch import Tensor, nn

from reat_fast.config import Config
from reat_fast.engine.step_attack import resolve_form
from reat_fast.kernels import winograd
from reat_fast.kernels.winograd import WinogradConv2d, use_winograd_
from reat_fast.models import NAMES, create_model
from reat_fast.networks import frozen
from reat_fast.networks.frozen import FrozenNetwork

# Of a batch's 70 images of 8x8, 32 are computed at a time and 6 in the end; one of 46x46 has more
# tiles than are meant to be computed at a time.
SHAPES = [
    *[(3, 5, 7, 6, 6), (2, 3, 4, 7, 5), (1, 1, 1, 2, 2), (70, 4, 6, 8, 8), (2, 1, 9, 1, 12)],
    (2, 2, 1, 46, 46),
]


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "winograd_pays", lambda: True)


def pair(inputs: int, outputs: int, bias: bool = True) -> tuple[nn.Sequential, nn.Sequential]:
    torch.manual_seed(0)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias).double().requires_grad_(False)
    plain = nn.Sequential(conv)
    quick = copy.deepcopy(plain)
    assert len(use_winograd_(quick, least_channels=1)) == 1
    return plain, quick


def outcome(network: nn.Module, x: Tensor, sizes: bool = False) -> tuple[Tensor, Tensor]:
    """Return the output and its gradient along given weights; sizes: of all terms they are of."""
    x = x.clone().requires_grad_()
    y = network(x)
    weights = torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).sin()
    weights = weights.abs() if sizes else weights
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    return y.detach(), gradient


@pytest.mark.parametrize("shape", [(3, 4, 8, 6), (2, 4, 7, 5)])
def test_what_comes_after_may_write_in_place(shape: tuple[int, ...]) -> None:
    plain, quick = pair(4, 6)
    x = torch.randn(*shape, dtype=torch.float64)
    for network in (plain, quick):
        network.append(nn.ReLU(inplace=True))
    for found, expected in zip(outcome(quick, x), outcome(plain, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_input_gradient_are_those_of_conv2d(
    shape: tuple[int, ...], layout: torch.memory_format, bias: bool
) -> None:
    batch, inputs, outputs, height, width = shape
    plain, quick = pair(inputs, outputs, bias)
    x = torch.randn(batch, inputs, height, width, dtype=torch.float64).to(memory_format=layout)
    for found, wanted in zip(outcome(quick, x), outcome(plain, x), strict=True):
        # The largest terms of the transforms are a few times the values; float64 rounds by 1e-16.
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_in_float32_it_rounds_as_little_as_sums_of_that_size() -> None:
    plain, quick = pair(160, 160)
    x = torch.randn(2, 160, 8, 8, dtype=torch.float64)
    true, absolute = outcome(plain, x), copy.deepcopy(plain)
    absolute[0].weight.data.abs_()
    absolute[0].bias.data.abs_()
    sizes = outcome(absolute, x.abs(), sizes=True)
    for exact, own, size in zip(true, outcome(quick.float(), x.float()), sizes, strict=True):
        # Transforms add up to 4 numbers before a product and 9 behind it, of both signs, each time
        # rounded by half a unit of the last of 24 bits; most of that cancels over 160 channels.
        assert ((own - exact).abs() / size).max() < 4 * 2.0**-24


def test_new_weights_count_after_refresh() -> None:
    plain, quick = pair(4, 3)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    for network in (plain, quick):
        network[0].weight.data.mul_(-2)
        network[0].bias.data.add_(1)
    quick[0].refresh_()
    torch.testing.assert_close(quick(x), plain(x), rtol=1e-12, atol=1e-12)


def test_only_plain_wide_3x3_convolutions_change() -> None:
    wide, narrow = winograd.LEAST_CHANNELS, winograd.LEAST_CHANNELS - 1
    network = nn.Sequential(
        nn.Conv2d(wide, wide, 3, padding=1),
        nn.Conv2d(wide, narrow, 3, padding=1),
        nn.Conv2d(narrow, wide, 3, padding=1),
        nn.Conv2d(wide, wide, 3, padding=1, stride=2),
        nn.Conv2d(wide, wide, 3, padding=2, dilation=2),
        nn.Conv2d(wide, wide, 3, padding=1, dilation=2),
        nn.Conv2d(wide, wide, 3, padding=1, groups=2),
        nn.Conv2d(wide, wide, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(wide, wide, 3, padding="same"),
        nn.Conv2d(wide, wide, 3),
        nn.Conv2d(wide, wide, 1),
        nn.Conv2d(wide, wide, (3, 1), padding=(1, 0)),
    ).requires_grad_(False)
    names = list(network.state_dict())
    assert use_winograd_(network) == [network[0]]
    assert list(network.state_dict()) == names


def test_images_that_a_tile_hardly_covers_and_one_without_a_batch_take_conv2d() -> None:
    plain, quick = pair(4, 3)
    one_pixel = torch.randn(5, 4, 1, 1, dtype=torch.float64)
    no_batch = torch.randn(4, 8, 8, dtype=torch.float64)
    with mock.patch.object(winograd, "winograd_conv", side_effect=AssertionError):
        for x in (one_pixel, no_batch):
            for found, wanted in zip(outcome(quick, x), outcome(plain, x), strict=True):
                assert torch.equal(found, wanted)


def test_weights_that_ask_for_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="0: its weights ask for a gradient"):
        use_winograd_(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), least_channels=1)


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("name", NAMES)
def test_a_network_in_this_form_equals_the_network(name: str) -> None:
    model = trained(name)
    with mock.patch.object(winograd, "LEAST_CHANNELS", 1):
        network = FrozenNetwork(model, form="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with_statistics(model)
    network.refresh()
    assert network.transformed and all(type(m) is WinogradConv2d for m in network.transformed)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    assert_equal_to_rounding(network, model, images)


@pytest.mark.usefixtures("pays")
def test_resnet18_has_its_wide_convolutions_changed() -> None:
    network = FrozenNetwork(create_model("resnet18", 10), form="cpu")
    assert [conv.out_channels for conv in network.transformed] == [256] * 3 + [512] * 3


@pytest.mark.usefixtures("pays")
def test_bfloat16_stays_with_conv2d() -> None:
    network = FrozenNetwork(create_model("resnet18", 10), torch.bfloat16, "cpu")
    assert not network.transformed


@pytest.mark.parametrize(
    ("vendor", "family", "flags", "pays"),
    [
        ("AuthenticAMD", "26", "fpu avx2 avx512f", False),
        ("AuthenticAMD", "25", "fpu avx2 avx512f", True),
        ("AuthenticAMD", "26", "fpu avx2", True),
        ("GenuineIntel", "6", "fpu avx2 avx512f", True),
    ],
)
def test_fewer_products_are_taken_where_products_are_fast(
    vendor: str, family: str, flags: str, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n"
    monkeypatch.setattr(winograd.Path, "read_text", lambda *_: about + "\n" + about)
    assert winograd.winograd_pays.__wrapped__() is pays


def test_where_a_cpu_cannot_be_told_fewer_products_are_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(winograd.Path, "read_text", mock.Mock(side_effect=FileNotFoundError))
    assert winograd.winograd_pays.__wrapped__()


def test_where_they_are_slow_convolutions_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "winograd_pays", lambda: False)
    assert not FrozenNetwork(create_model("resnet18", 10), form="cpu").transformed


def test_it_is_the_form_of_a_cpu() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_form(Config(), cpu) == "cpu"
    assert resolve_form(Config(precision="bf16"), cpu) == "eager"
    assert resolve_form(Config(precision="float32"), cuda) == "eager"
    assert resolve_form(Config(attack_form="eager"), cpu) == "eager"

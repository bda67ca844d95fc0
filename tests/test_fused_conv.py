"""The fused convolution against autograd over PyTorch's operators, at the kink of ReLU too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_frozen import conv_gradient_masks
from torch import Tensor
from torch.nn import functional as F

from reat_fast.kernels.fused_conv import conv_relu, conv_relu_linked, conv_relu_torch

CASES: list[dict[str, Any]] = [
    {},
    {"padding": (1, 1)},
    {"stride": (2, 2), "padding": (1, 1)},
    {"stride": (2, 1), "padding": (0, 2)},
    {"dilation": (2, 2), "padding": (2, 2)},
    {"groups": 2, "padding": (1, 1)},
]


def integers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw small integers: their sums are exact, and often zero."""
    return torch.randint(-1, 2, shape).to(dtype)


def case(options: dict[str, Any], with_bias: bool, with_residual: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    weight = integers(6, 4 // options.get("groups", 1), 3, 3)
    x = integers(2, 4, 9, 8)
    output = F.conv2d(x, weight, **options)
    return {
        "x": x.requires_grad_(),
        "weight": weight,
        "bias": integers(6) if with_bias else None,
        "residual": integers(*output.shape).requires_grad_() if with_residual else None,
        "stride": (1, 1),
        "padding": (0, 0),
        "dilation": (1, 1),
        "groups": 1,
        **options,
    }


def gradients(output: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    wanted = [given[name] for name in ("x", "residual") if given[name] is not None]
    torch.manual_seed(1)
    return torch.autograd.grad(output, wanted, integers(*output.shape))


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("options", CASES)
def test_output_and_gradients_are_those_of_autograd_bit_for_bit(
    options: dict[str, Any], with_bias: bool, with_residual: bool
) -> None:
    given = case(options, with_bias, with_residual)
    found, wanted = conv_relu(**given), conv_relu_torch(**given)
    ties = wanted == 0
    assert 0.1 < float(ties.double().mean()) < 0.9
    assert torch.equal(found, wanted)
    for a, b in zip(gradients(found, given), gradients(wanted, given), strict=True):
        assert torch.equal(a, b)


def test_the_gradient_at_zero_is_zero() -> None:
    x = torch.zeros(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    residual = torch.tensor([[[[-1.0, 0.0, 1.0]]]], dtype=torch.float64, requires_grad=True)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    output = conv_relu(x, weight, residual=residual)
    for gradient in torch.autograd.grad(output.sum(), (x, residual)):
        assert gradient.flatten().tolist() == [0, 0, 1]


def test_random_values_agree_with_autograd() -> None:
    given = case({"padding": (1, 1)}, True, True)
    for name in ("x", "residual", "weight", "bias"):
        fresh = torch.randn(given[name].shape, dtype=torch.float64)
        given[name] = fresh.requires_grad_(given[name].requires_grad)
    found, wanted = conv_relu(**given), conv_relu_torch(**given)
    # The same sums of 36 products in float64, perhaps in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(found, given), gradients(wanted, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_that_only_the_weight_has_are_zeros(
    with_residual: bool, stride: int, channels_last: bool
) -> None:
    given = case({"stride": (stride, stride), "padding": (1, 1)}, True, with_residual)
    if channels_last:
        x = given["x"].detach().contiguous(memory_format=torch.channels_last)
        given["x"] = x.requires_grad_()
    more = F.pad(given["weight"], (0, 0, 0, 0, 0, 4))
    more[:, 4:] = integers(6, 4, 3, 3)  # they meet zeros
    wanted, found = conv_relu(**given), conv_relu(**{**given, "weight": more})
    assert torch.equal(found, wanted)
    for a, b in zip(gradients(found, given), gradients(wanted, given), strict=True):
        assert a.shape == b.shape and torch.equal(a, b)


def test_filled_channels_change_float32_by_rounding_alone() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 9, 9), torch.randn(8, 3, 3, 3), torch.randn(8)
    results = []
    for given in (weight, F.pad(weight, (0, 0, 0, 0, 0, 5))):
        leaf = x.clone().requires_grad_()
        output = conv_relu(leaf, given, bias, padding=(1, 1))
        results.append((output.detach(), *torch.autograd.grad(output.square().sum(), leaf)))
    for a, b in zip(*results, strict=True):
        # Sums of 27 and 72 products near 1, each rounded by 2^-24, in whatever order.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_only_what_is_asked_for_is_computed() -> None:
    given = case({}, True, True)
    given["x"] = given["x"].detach()
    output = conv_relu(**given)
    with conv_gradient_masks() as masks:
        (gradient,) = torch.autograd.grad(output.sum(), given["residual"])
    assert torch.equal(gradient, (output > 0).double())
    assert masks == []


def convolution(channels: int) -> Tensor:
    return integers(channels, 6, 3, 3)


@pytest.mark.parametrize("chosen", ["both", "first", "second", "neither"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_reader_that_masks_gives_the_gradients_of_autograd(
    with_residual: bool, chosen: str
) -> None:
    given = case({"padding": (1, 1)}, True, with_residual)
    leaves = [given[name] for name in ("x", "residual") if given[name] is not None]
    torch.manual_seed(2)
    weight, other_weight = convolution(6), convolution(3)
    results = []
    for linked in (True, False):
        if linked:
            maps, _ = conv_relu_linked(**given, reader_masks=True)
            read, same = conv_relu_linked(maps, weight, masks_input=True)
            assert same.data_ptr() == maps.data_ptr() and torch.equal(same, maps)
        else:
            same = conv_relu_torch(**given)
            read = F.relu(F.conv2d(same, weight))
        total = sum(leaf.sum() for leaf in leaves)  # so that there is always a gradient
        if chosen in ("both", "first"):
            total = total + read.square().sum()
        if chosen in ("both", "second"):
            total = total + F.conv2d(same, other_weight).square().sum()
        results.append(torch.autograd.grad(total, leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_the_gradient_of_another_reader_is_added_without_a_mask_too() -> None:
    given = case({"padding": (1, 1)}, True, True)
    output, same = conv_relu_linked(**given)
    seeds = integers(*output.shape), integers(*same.shape)
    found = torch.autograd.grad((output, same), given["x"], seeds)[0]
    wanted = torch.autograd.grad(conv_relu_torch(**given), given["x"], seeds[0])[0] + seeds[1]
    assert torch.equal(found, wanted)


class _Silent(torch.autograd.Function):
    """Pass values on, and send no gradient back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        return None


def test_a_reader_that_sends_no_gradient_back_leaves_none() -> None:
    given = case({}, True, True)
    total = _Silent.apply(conv_relu(**given)).sum()  # type: ignore[no-untyped-call]
    leaves = (given["x"], given["residual"])
    assert torch.autograd.grad(total, leaves, allow_unused=True) == (None, None)


@pytest.mark.parametrize("chosen", ["both", "first", "second"])
@pytest.mark.parametrize("masks_input", [False, True])
def test_a_shortcut_beside_it_gives_the_gradients_of_autograd(
    masks_input: bool, chosen: str
) -> None:
    given = case({"stride": (2, 2), "padding": (1, 1)}, True, True)
    weight = integers(5, 4, 1, 1)
    shortcut = weight, ((2, 2), (0, 0), (1, 1), 1)
    if masks_input:
        given["x"] = given["x"].detach().relu().requires_grad_()
    found = conv_relu_linked(**given, masks_input=masks_input, shortcut=shortcut)
    wanted = conv_relu_torch(**given), F.conv2d(given["x"], weight, stride=2)
    leaves = (given["x"], given["residual"])
    seeds = [integers(*output.shape) for output in wanted]
    rows = {"both": slice(0, 2), "first": slice(0, 1), "second": slice(1, 2)}[chosen]
    results = [
        torch.autograd.grad(outputs[rows], leaves, seeds[rows], allow_unused=True)
        for outputs in (found, wanted)
    ]
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)
    (x, residual), (right, right_residual) = results
    if masks_input:
        right = torch.where(given["x"] <= 0, 0, right)
    assert torch.equal(x, right)
    assert (residual is None) == (right_residual is None)
    assert residual is None or torch.equal(residual, right_residual)


def test_gradients_that_arrive_are_left_as_they_are() -> None:
    given = case({"padding": (1, 1)}, True, True)
    outputs = conv_relu_linked(**given, masks_input=True)
    seeds = [integers(*output.shape) for output in outputs]
    kept = [seed.clone() for seed in seeds]
    torch.autograd.grad(outputs, (given["x"], given["residual"]), seeds)
    assert all(torch.equal(seed, was) for seed, was in zip(seeds, kept, strict=True))


def test_a_second_derivative_is_refused() -> None:
    given = case({}, True, False)
    output = conv_relu(**given)
    (gradient,) = torch.autograd.grad(output.square().sum(), given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_channels_last_stays_channels_last() -> None:
    given = case({"padding": (1, 1)}, True, True)
    for name in ("x", "residual", "weight"):
        tensor = given[name].detach().contiguous(memory_format=torch.channels_last)
        given[name] = tensor.requires_grad_(name != "weight")
    output = conv_relu(**given)
    gradient = torch.autograd.grad(output.sum(), given["x"])[0]
    for tensor in (output, gradient):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_asks_for_a_gradient_is_refused(name: str) -> None:
    given = case({}, True, False)
    given[name].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for weight and bias"):
        conv_relu(**given)


def test_a_residual_that_would_be_spread_is_refused() -> None:
    given = case({}, True, False)
    given["residual"] = integers(2, 6, 1, 1)
    with pytest.raises(ValueError, match=r"residual is \[2, 6, 1, 1\], the output \[2, 6, 7, 6\]"):
        conv_relu(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("stride", "channels"), [(1, 64), (2, 64), (1, 3)])
def test_cudnn_computes_the_same_on_a_gpu(
    dtype: torch.dtype, with_residual: bool, with_bias: bool, stride: int, channels: int
) -> None:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    layout = {"device": "cuda", "dtype": dtype, "memory_format": torch.channels_last}
    x = torch.randn(8, channels, 16, 16).to(**layout).requires_grad_()  # type: ignore[call-overload]
    weight = (torch.randn(128, channels, 3, 3) / 24).to(**layout)  # type: ignore[call-overload]
    missing = -channels % 8
    filled = F.pad(weight, (0, 0, 0, 0, 0, missing)).contiguous(memory_format=torch.channels_last)
    size = 16 // stride
    residual = torch.randn(8, 128, size, size).to(**layout)  # type: ignore[call-overload]
    residual = residual.requires_grad_() if with_residual else None
    bias = torch.randn(128, device="cuda", dtype=dtype) if with_bias else None
    for _ in range(2):
        # What the allocator hands out next is NaN: an output that is read before it is written,
        # multiplied by a zero, would show.
        shape, place = (8, 128, size, size), {"device": "cuda", "dtype": dtype}
        poison = [torch.full(shape, float("nan"), **place) for _ in range(4)]  # type: ignore[call-overload]
        del poison
        output = conv_relu(x, filled, bias, residual, (stride, stride), (1, 1))
    seed = torch.randn_like(output)
    wanted_of = [tensor for tensor in (x, residual) if tensor is not None]
    found = [output, *torch.autograd.grad(output, wanted_of, seed)]

    double = [None if t is None else t.detach().double() for t in (x, weight, bias, residual)]
    exact = conv_relu_torch(*double, (stride, stride), (1, 1), (1, 1), 1)  # type: ignore[arg-type]
    masked = seed.double() * (output > 0)
    grad_x = torch.nn.grad.conv2d_input(x.shape, double[1], masked, stride, 1)  # type: ignore[arg-type]
    wanted = [exact, grad_x, masked][: len(found)]
    # One rounding to the dtype of sums that were made in float32 is half of eps; twice that.
    eps = torch.finfo(dtype).eps
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=eps, atol=1e-5)

"""Average and linear layer in one op against autograd over PyTorch's operators, and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.kernels.pooled_linear import (
    MOST_CLASSES,
    pooled_linear,
    pooled_linear_torch,
)
from reat_fast.kernels.triton_support import Backend

Place = tuple[Backend, str]

CASES = [
    # images, channels, height, width, classes
    (3, 512, 4, 4, 10),
    (2, 640, 8, 8, 100),
    (3, 37, 7, 7, 10),
    (2, 24, 1, 1, 1000),
    (1, 1, 1, 1, 1),
    (2, 13, 9, 15, 17),  # more pixels than a tile has
    (1, 600, 2, 3, 2),
]


def made(
    case: tuple[int, ...], dtype: torch.dtype, device: str, integers: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return maps behind a ReLU, channels_last, weight, bias and the gradient of the logits."""
    batch, channels, height, width, classes = case
    torch.manual_seed(sum(case))
    shapes = (batch, channels, height, width), (classes, channels), (classes,), (batch, classes)
    if integers:
        drawn = [torch.randint(-2, 3, shape).float() for shape in shapes]
    else:
        drawn = [torch.randn(shape) for shape in shapes]
    x, weight, bias, grad = (tensor.to(device, dtype) for tensor in drawn)
    return x.relu().contiguous(memory_format=torch.channels_last), weight, bias, grad


def both_ways(
    given: tuple[Tensor, Tensor, Tensor | None, Tensor], **options: Any
) -> tuple[Tensor, Tensor]:
    x, weight, bias, grad = given
    leaf = x.detach().requires_grad_()
    logits = pooled_linear(leaf, weight, bias, **options)
    return logits.detach(), torch.autograd.grad(logits, leaf, grad)[0]


def exact(
    given: tuple[Tensor, Tensor, Tensor | None, Tensor], masked: bool
) -> tuple[Tensor, Tensor]:
    """Compute both ways in float64, by formulas written without the op."""
    x, weight, bias, grad = (None if t is None else t.double() for t in given)
    assert x is not None and weight is not None and grad is not None
    logits = torch.einsum("bchw,kc->bk", x, weight) / x[0, 0].numel()
    if bias is not None:
        logits = logits + bias
    spread = torch.einsum("bk,kc->bc", grad, weight)[:, :, None, None] / x[0, 0].numel()
    spread = spread.expand_as(x)
    return logits, torch.where(x <= 0, 0, spread) if masked else spread


@pytest.mark.parametrize("masks_input", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_it_is_float64_rounded(
    place: Place, case: tuple[int, ...], dtype: torch.dtype, with_bias: bool, masks_input: bool
) -> None:
    backend, device = place
    x, weight, bias, grad = made(case, dtype, device)
    given = (x, weight, bias if with_bias else None, grad)
    found = both_ways(given, masks_input=masks_input, backend=backend)
    # The kernels' sums are float32 and rounded once: half of eps, and some dozens of 2^-24 of the
    # largest summands. PyTorch rounds the mean too, and each product of c numbers sees that.
    low = dtype.itemsize == 2
    eps = torch.finfo(dtype).eps if low else 2.0**-20
    for a, b in zip(found, exact(given, masks_input), strict=True):
        assert a.dtype == dtype
        scale = float(b.abs().max())
        if backend == "torch":
            torch.testing.assert_close(a.double(), b, rtol=2 * eps, atol=4 * eps * scale)
        else:
            torch.testing.assert_close(a.double(), b, rtol=eps, atol=1e-5 * scale)
    assert found[1].stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_integers_are_exact(place: Place, dtype: torch.dtype) -> None:
    backend, device = place
    given = made((5, 40, 4, 4, 10), dtype, device, integers=True)
    given = (given[0] * 16, *given[1:])  # whose mean over 16 pixels is whole
    for a, b in zip(
        both_ways(given, masks_input=True, backend=backend), exact(given, True), strict=True
    ):
        assert torch.equal(a.double(), b.to(dtype).double())


def test_the_gradient_passes_where_maps_are_nan_and_stops_at_both_zeros(place: Place) -> None:
    backend, device = place
    x, weight, bias, grad = made((1, 4, 2, 2, 3), torch.float32, device, integers=True)
    x.fill_(1.0)
    x[0, :, 0, 0], x[0, :, 0, 1], x[0, :, 1, 0] = torch.nan, -0.0, 0.0
    weight.fill_(1.0)
    grad.fill_(4.0)
    _, found = both_ways((x, weight, bias, grad), masks_input=True, backend=backend)
    assert found[0].tolist() == [[[3.0, 0.0], [0.0, 3.0]]] * 4
    _, found = both_ways((x, weight, bias, grad), backend=backend)
    assert found[0].tolist() == [[[3.0, 3.0], [3.0, 3.0]]] * 4


def test_nan_reaches_the_logits_of_its_image_alone(place: Place) -> None:
    backend, device = place
    x, weight, bias, _ = made((3, 8, 3, 3, 5), torch.float32, device)
    x[1, 6, 2, 2] = torch.nan
    found = pooled_linear(x, weight, bias, backend=backend)
    assert found.isnan().tolist() == [[False] * 5, [True] * 5, [False] * 5]


@pytest.mark.parametrize("masks_input", [False, True])
def test_float64_is_autograd_over_the_definition(masks_input: bool, place: Place) -> None:
    backend, device = place
    x, weight, bias, grad = made((3, 12, 3, 5, 7), torch.float64, device)
    before = (x - 0.5).requires_grad_()
    maps = before.relu() if masks_input else before
    wanted = pooled_linear_torch(maps, weight, bias)
    (gradient,) = torch.autograd.grad(wanted, before, grad)
    given = (maps.detach(), weight, bias, grad)
    found = both_ways(given, masks_input=masks_input, backend=backend)
    # Sums of a dozen numbers of float64.
    torch.testing.assert_close(found[0], wanted.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found[1], gradient, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "spread"])
def test_maps_in_other_layouts_are_taken_too(place: Place, layout: str) -> None:
    backend, device = place
    x, weight, bias, grad = made((3, 12, 4, 4, 7), torch.float32, device)
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "strided":
        room = torch.full((3, 12, 4, 9), torch.nan, device=device)
        room[..., ::2][..., :4] = x
        x = room[..., ::2][..., :4]
    else:
        x = x[:, :, :1, :1].expand(3, 12, 4, 4)
    given = (x, weight, bias, grad)
    found = both_ways(given, masks_input=True, backend=backend)
    for a, b in zip(found, exact(given, True), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


def test_weights_and_gradients_in_other_layouts_are_taken_too(place: Place) -> None:
    backend, device = place
    x, weight, bias, grad = made((3, 12, 4, 4, 7), torch.float32, device)
    wanted = both_ways((x, weight, bias, grad), masks_input=True, backend=backend)
    turned = (
        x,
        weight.t().contiguous().t(),
        bias.repeat(2, 1).t()[:, 0],
        grad.t().contiguous().t(),
    )
    found = both_ways(turned, masks_input=True, backend=backend)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # PyTorch may add in another order


def test_more_classes_than_the_kernels_take_and_no_images_are_taken_too(place: Place) -> None:
    backend, device = place
    given = made((2, 4, 2, 2, MOST_CLASSES + 1), torch.float32, device)
    found = both_ways(given, masks_input=True, backend=backend)
    for a, b in zip(found, exact(given, True), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)
    x, weight, bias, grad = made((2, 4, 2, 2, 3), torch.float32, device)
    logits, gradient = both_ways((x[:0], weight, bias, grad[:0]), backend=backend)
    assert logits.shape == (0, 3) and gradient.shape == (0, 4, 2, 2)


def test_maps_of_other_dimensions_are_those_of_the_definition(place: Place) -> None:
    backend, device = place
    x, weight = torch.randn(2, 5, 3, 4, 6, device=device), torch.randn(7, 6, device=device)
    found = pooled_linear(x, weight, backend=backend)
    assert torch.equal(found, F.linear(x.mean((2, 3)), weight))


def test_equal_inputs_give_equal_bits(place: Place) -> None:
    backend, device = place
    given = made((4, 70, 5, 5, 20), torch.float32, device)
    first, again = (both_ways(given, masks_input=True, backend=backend) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_maps_that_need_no_mask_may_be_overwritten_before_the_backward() -> None:
    x, weight, bias, grad = made((2, 4, 3, 3, 5), torch.float64, "cpu")
    leaf = x.requires_grad_()
    maps = leaf * 1
    logits = pooled_linear(maps, weight, bias)
    maps.add_(1)
    (found,) = torch.autograd.grad(logits, leaf, grad)
    torch.testing.assert_close(found, exact((x, weight, bias, grad), False)[1])


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_weight_that_asks_for_a_gradient_is_refused(name: str) -> None:
    x, weight, bias, _ = made((2, 4, 3, 3, 5), torch.float32, "cpu")
    {"weight": weight, "bias": bias}[name].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for weight and bias"):
        pooled_linear(x, weight, bias)


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias, _ = made((2, 4, 3, 3, 5), torch.float32, "cpu")
    leaf = x.requires_grad_()
    logits = pooled_linear(leaf, weight, bias)
    (gradient,) = torch.autograd.grad(logits.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_shapes_that_do_not_fit_are_refused_as_the_definition_does(place: Place) -> None:
    backend, device = place
    x, weight, _, _ = made((2, 4, 3, 3, 5), torch.float32, device)
    with pytest.raises(RuntimeError):
        pooled_linear(x, weight[:, :3], backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_can_be_captured(dtype: torch.dtype) -> None:
    given = made((128, 512, 4, 4, 10), dtype, "cuda")
    wanted = both_ways(given, masks_input=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_ways(given, masks_input=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = both_ways(given, masks_input=True)
    for tensor in found:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

"""BatchNorm with sum and ReLU against float64, its running statistics, and what it refuses."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from reat_fast.kernels.batchnorm import fused_batchnorm
from reat_fast.kernels.triton_support import Backend

Place = tuple[Backend, str]
SHAPES = [(2, 8, 5, 7), (3, 70, 9, 9), (1, 1, 1, 2), (9, 24, 16, 16)]
REAL = [(128, 64, 32, 32), (128, 128, 16, 16), (128, 256, 8, 8), (128, 512, 4, 4)]
FORMS = list(itertools.product((False, True), repeat=2))  # residual, ReLU
# Half a unit in the last place of bfloat16 is 2^-9 and of float16 2^-12, once; float32 is rounded
# some dozens of times by 2^-24. Twice that, of the largest value.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Result(NamedTuple):
    """What comes of a forward and a backward."""

    output: Tensor
    of_x: Tensor
    of_weight: Tensor
    of_bias: Tensor
    of_residual: Tensor | None
    mean: Tensor
    variance: Tensor
    batches: Tensor


class Given(NamedTuple):
    """Images, residual, gradient, and four rows of [C]: weight, bias, running mean and variance."""

    x: Tensor
    residual: Tensor | None
    gradient: Tensor
    channels: Tensor

    def run(self, relu: bool, backend: Backend, dtype: torch.dtype | None = None) -> Result:
        """Compute forward and backward; dtype: of everything, if given."""
        given = self if dtype is None else Given(*(t if t is None else t.to(dtype) for t in self))
        x = given.x.detach().requires_grad_()
        residual = None if given.residual is None else given.residual.detach().requires_grad_()
        weight, bias, mean, variance = given.channels.clone()
        weight.requires_grad_()
        bias.requires_grad_()
        batches = torch.tensor(3, device=x.device)
        statistics = (mean, variance, batches, 0.3, 1e-5)
        output = fused_batchnorm(x, weight, bias, *statistics, residual, relu, backend=backend)
        output.backward(given.gradient)
        assert x.grad is not None and weight.grad is not None and bias.grad is not None
        of_residual = None if residual is None else residual.grad
        gradients = (x.grad, weight.grad, bias.grad, of_residual)
        return Result(output.detach(), *gradients, mean, variance, batches)


def case(shape: tuple[int, ...], dtype: torch.dtype, device: str, residual: bool = False) -> Given:
    made = torch.Generator().manual_seed(sum(shape))
    x, added, gradient = torch.randn(3, *shape, generator=made)
    channels = torch.randn(4, shape[1], generator=made)
    channels[3].abs_()
    images = [t.to(device, dtype, memory_format=torch.channels_last) for t in (x / 2 + 3, added)]
    gradient = gradient.to(device, dtype, memory_format=torch.channels_last)
    return Given(images[0], images[1] if residual else None, gradient, channels.to(device))


def away_from_zero(given: Given) -> Given:
    """Let no gradient arrive where rounding may decide whether a ReLU lets it pass."""
    before = given.run(False, "torch", torch.float64).output
    return given._replace(gradient=torch.where(before.abs() < 1e-4, 0, given.gradient))


def assert_near(found: Result, exact: Result, given: Given) -> None:
    """Hold a result against that in float64."""
    dtype = given.x.dtype
    inverse = (given.x.double().var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    # The gradients of x add up to nothing, so their own size is no measure where N is 2.
    steepest = (given.channels[0] * inverse).abs().max() * given.gradient.abs().max()
    scales = {
        name: float(tensor.abs().max())
        for name, tensor in exact._asdict().items()
        if tensor is not None
    }
    scales["of_x"] = max(scales["of_x"], float(steepest))
    # And the mean is rounded to a float32, which is much of a small spread.
    rounding = 2.0**-23 * float((given.x.double().abs().amax((0, 2, 3)) * inverse).max())
    rounded = ("output", "of_x", "of_residual")
    for name, tensor in found._asdict().items():
        if tensor is None:
            continue
        part = TOLERANCES[dtype if name in rounded else torch.float32] + rounding
        wanted = getattr(exact, name)
        error = float((tensor.double() - wanted.double()).abs().max())
        assert error <= part * scales[name], (name, error, scales[name])
    assert int(found.batches) == 4


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("residual", "relu"), FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_gradients_and_statistics_are_those_of_float64(
    device: str, shape: tuple[int, ...], residual: bool, relu: bool, dtype: torch.dtype
) -> None:
    given = away_from_zero(case(shape, dtype, device, residual))
    found = given.run(relu, "triton")
    assert found.output.dtype == found.of_x.dtype == dtype
    assert found.output.stride() == given.x.stride()
    assert_near(found, given.run(relu, "torch", torch.float64), given)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("residual", "relu"), FORMS)
@pytest.mark.parametrize("shape", REAL)
def test_the_shapes_of_a_resnet_are_computed_as_well(
    shape: tuple[int, ...], residual: bool, relu: bool, dtype: torch.dtype
) -> None:
    given = away_from_zero(case(shape, dtype, "cuda", residual))
    found = given.run(relu, "triton")
    exact = given.run(relu, "torch", torch.float64)
    assert_near(found, exact, given)
    again = given.run(relu, "triton")
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("residual", "relu"), FORMS)
def test_a_replay_computes_what_a_launch_does(residual: bool, relu: bool) -> None:
    given = case((128, 64, 32, 32), torch.bfloat16, "cuda", residual)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x, added = (None if t is None else t.detach().requires_grad_() for t in given[:2])
        weight, bias = given.channels[:2].clone().requires_grad_()
        mean, variance = given.channels[2:].clone()
        batches = torch.tensor(3, device="cuda")
        assert x is not None
        inputs = [t for t in (x, weight, bias, added) if t is not None]

        def body() -> list[Tensor]:
            statistics = (mean, variance, batches, 0.3, 1e-5)
            output = fused_batchnorm(x, weight, bias, *statistics, added, relu)
            return [output, *torch.autograd.grad(output, inputs, given.gradient)]

        launched = body()
        after = [t.clone() for t in (mean, variance, batches)]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        replayed = body()
    mean.copy_(given.channels[2])
    variance.copy_(given.channels[3])
    batches.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    found = [*replayed, mean, variance, batches]
    for a, b in zip(found, [*launched, *after], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("relu", [False, True])
def test_the_pytorch_form_is_to_the_bit_what_modules_compute(relu: bool) -> None:
    given = case((3, 8, 6, 5), torch.float32, "cpu")
    norm = nn.BatchNorm2d(8, momentum=0.3)
    parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    with torch.no_grad():
        for tensor, value in zip(parameters, given.channels, strict=True):
            assert tensor is not None
            tensor.copy_(value)
    x = given.x.clone().requires_grad_()
    output = norm(x).relu() if relu else norm(x)
    output.backward(given.gradient)
    found = given.run(relu, "auto")
    assert x.grad is not None and norm.weight.grad is not None and norm.bias.grad is not None
    wanted = (output.detach(), x.grad, norm.weight.grad, norm.bias.grad, *parameters[2:])
    for a, b in zip((*found[:4], *found[5:7]), wanted, strict=True):
        assert b is not None and torch.equal(a, b)


@pytest.mark.parametrize("shape", [(4, 8, 16, 16), (64, 70, 10, 10)])
def test_a_large_mean_does_not_ruin_a_small_variance(device: str, shape: tuple[int, ...]) -> None:
    given = case(shape, torch.float32, device)
    given = given._replace(x=(given.x - 3) / 5 + 1000)  # a spread of 0.1, known to 6e-5
    found = given.run(False, "triton")
    exact = given.run(False, "torch", torch.float64)
    torch.testing.assert_close(found.variance.double(), exact.variance, rtol=1e-5, atol=0)
    # The mean is rounded to half a unit of 6e-5, 3e-4 of the spread, by any form.
    scale = float(given.channels[0].abs().max())
    torch.testing.assert_close(found.output.double(), exact.output, rtol=1e-5, atol=1e-3 * scale)


def test_one_value_per_channel_is_refused_as_by_pytorch(place: Place) -> None:
    backend, device = place
    given = case((1, 5, 1, 1), torch.float32, device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        given.run(True, backend)


def test_a_constant_channel_becomes_its_bias(device: str) -> None:
    given = case((3, 6, 4, 4), torch.float32, device)
    given.x[:, 2] = 7.3
    found, exact = given.run(False, "triton"), given.run(False, "torch", torch.float64)
    torch.testing.assert_close(found.output.double(), exact.output, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.output[:, 2], given.channels[1, 2].expand(3, 4, 4))
    torch.testing.assert_close(found.of_x.double(), exact.of_x, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(found.variance[2], given.channels[3, 2] * 0.7)


def test_no_gradient_passes_at_zero(place: Place) -> None:
    backend, device = place
    for residual in (False, True):
        given = case((3, 6, 4, 4), torch.float32, device, residual)
        given.channels[:2, 1] = 0
        if given.residual is not None:
            given.residual[:, 1] = -0.0
        found = given.run(True, backend)
        assert not found.output[:, 1].any() and not found.of_x[:, 1].any()
        assert not found.of_weight[1] and not found.of_bias[1]
        assert found.of_residual is None or not found.of_residual[:, 1].any()


def test_not_a_number_stays_in_its_channel_and_lets_gradients_pass(place: Place) -> None:
    backend, device = place
    given = case((3, 6, 4, 4), torch.float32, device, residual=True)
    assert given.residual is not None
    plain = given.run(True, backend)
    given.residual[1, 2, 3, 0] = torch.nan
    found, wanted = given.run(True, backend), given.run(True, "torch")
    assert bool(found.output[1, 2, 3, 0].isnan()) and int(found.output.isnan().sum()) == 1
    assert found.of_residual is not None and wanted.of_residual is not None
    assert torch.equal(found.of_residual, wanted.of_residual)
    assert bool(found.of_x.isfinite().all())
    given = case((3, 6, 4, 4), torch.float32, device, residual=True)
    given.x[1, 2, 3, 0] = torch.nan
    found = given.run(True, backend)
    others = [channel for channel in range(6) if channel != 2]
    assert bool(found.output[:, 2].isnan().all()) and bool(found.of_x[:, 2].isnan().all())
    assert torch.equal(found.output[:, others], plain.output[:, others])
    assert torch.equal(found.of_x[:, others], plain.of_x[:, others])
    assert found.of_residual is not None
    assert torch.equal(found.of_residual[:, 2], given.gradient[:, 2])


def test_any_layout_and_gradients_spread_from_a_mean_are_taken(place: Place) -> None:
    backend, device = place
    given = case((3, 12, 5, 6), torch.float32, device, residual=True)
    assert given.residual is not None
    spread = given.gradient.mean((2, 3), keepdim=True).expand_as(given.gradient)
    wanted = given._replace(gradient=spread.contiguous()).run(True, backend)
    other = Given(
        given.x.contiguous(),
        given.residual.repeat_interleave(2, 3)[:, :, :, ::2],
        spread,
        given.channels,
    )
    found = other.run(True, backend)
    for name in Result._fields:
        # PyTorch sums other layouts in another order.
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-5, msg=name
        )


def test_other_types_and_shapes_take_pytorchs_operators(place: Place) -> None:
    backend, device = place
    double = case((2, 4, 3, 3), torch.float64, device)
    double = double._replace(channels=double.channels.double())
    assert double.run(True, backend).output.dtype == torch.float64
    given = case((2, 4, 3, 3), torch.float32, device, residual=True)
    assert given.residual is not None
    wide = given._replace(residual=given.residual[:, :1])
    found, wanted = wide.run(True, backend), wide.run(True, "torch")
    assert torch.equal(found.output, wanted.output)
    mixed = given._replace(x=given.x.bfloat16())
    assert mixed.run(True, backend).output.dtype == torch.float32
    with pytest.raises(RuntimeError):
        given._replace(channels=given.channels[:, :3]).run(True, backend)


def test_what_asks_for_no_gradient_gets_none(place: Place) -> None:
    backend, device = place
    given = case((2, 4, 3, 3), torch.float32, device, residual=True)
    weight, bias, mean, variance = given.channels.clone()
    batches = torch.tensor(0, device=device)
    statistics = (mean, variance, batches, 0.1, 1e-5)
    weight.requires_grad_()
    output = fused_batchnorm(
        given.x, weight, bias, *statistics, given.residual, True, backend=backend
    )
    output.sum().backward()
    assert weight.grad is not None and given.x.grad is None and bias.grad is None
    with torch.no_grad():
        assert not fused_batchnorm(
            given.x, weight, bias, *statistics, backend=backend
        ).requires_grad
    assert int(batches) == 2

"""Launches of every op, with the dtypes and shapes that it is made for; bench.aot compiles them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from reat_fast.engine.augment import apply_policy
from reat_fast.kernels.affine_relu import affine_relu_linked
from reat_fast.kernels.batchnorm import fused_batchnorm
from reat_fast.kernels.class_loss import MOST_CLASSES, class_loss
from reat_fast.kernels.conv3x3 import conv3x3, conv3x3_gradient
from reat_fast.kernels.l2 import l2_step_
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.masked_sum import masked_sum
from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.kernels.prepare import Noise, prepare
from reat_fast.kernels.resident_conv import launch_resident_conv
from reat_fast.kernels.stem_conv import stem_conv
from reat_fast.kernels.strided_conv import strided_conv
from reat_fast.kernels.strided_gradient import strided_gradient
from reat_fast.kernels.tail_penalty import Form, tail_penalty

Launch = tuple[str, Callable[[], object]]
"""An op by its name with dtype and shape, and the call."""


def launches() -> Iterator[Launch]:
    """Yield the launches that stand for each op, on CPU tensors."""
    return chain(_losses(), _inputs(), _maps(), _convolutions(), _steps())


def _losses() -> Iterator[Launch]:
    for batch, classes, dtype in (
        (128, 10, torch.float32),
        (128, 100, torch.float32),
        (1024, 1000, torch.bfloat16),
    ):
        logits = torch.zeros(batch, classes, dtype=dtype, requires_grad=True)
        offsets = torch.zeros(classes)
        launch = partial(class_loss, logits, _integers(batch), offsets=offsets, backend="triton")
        yield _name("class_loss", logits), launch
    for classes in (100, MOST_CLASSES):
        logits = torch.zeros(64, classes, requires_grad=True)
        offsets, weights = torch.zeros(classes), torch.ones(classes)
        launch = partial(
            class_loss,
            logits,
            _integers(64),
            offsets=offsets,
            weights=weights,
            label_smoothing=0.1,
            backend="triton",
        )
        yield _name("class_loss weighted, smoothed", logits), launch
    forms: tuple[Form, ...] = ("official", "pairwise")
    for form in forms:
        for batch, width, dtype in ((128, 512, torch.float32), (1024, 640, torch.bfloat16)):
            features = torch.zeros(batch, width, dtype=dtype, requires_grad=True)
            labels, counts = _integers(batch), _integers(100)
            launch = partial(tail_penalty, features, labels, counts, form=form, backend="triton")
            yield _name(f"tail_penalty {form}", features), launch


def _inputs() -> Iterator[Launch]:
    noises: tuple[Noise, ...] = ("uniform", "normal")
    for noise in noises:
        images = torch.zeros(128, 32, 32, 3, dtype=torch.uint8)
        start = partial(prepare, images, _integers(128), 0, 0, 8 / 255, backend="triton")
        yield _name(f"prepare {noise}", images), partial(start, noise=noise)
    for policy, shape in (("autoaugment", (32, 32, 3)), ("randaugment", (28, 28, 1))):
        images = torch.zeros(128, *shape, dtype=torch.uint8)
        augment = partial(apply_policy, images, _integers(128), 0, 0, policy, backend="triton")
        yield _name(policy, images), augment


def _maps() -> Iterator[Launch]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        maps = torch.zeros(128, 64, 32, 32, dtype=dtype)
        yield _name("masked_sum", maps), partial(masked_sum, maps, maps, maps, backend="triton")
    for width, size, dtype, added in (
        (160, 32, torch.bfloat16, True),
        (640, 8, torch.bfloat16, True),
        (64, 32, torch.bfloat16, False),
        (16, 32, torch.float16, True),
        (160, 32, torch.float32, True),
    ):
        maps = _channels_last(128, width, size, size).to(dtype)
        case = "affine_relu" + ", sum" * added
        yield _name(case, maps), partial(_affine_relu, maps, maps if added else None)
    for shape, classes, dtype in (
        ((128, 512, 4, 4), 10, torch.bfloat16),
        ((128, 640, 8, 8), 100, torch.bfloat16),
        ((128, 2048, 4, 4), 10, torch.float16),
        ((128, 512, 7, 7), 200, torch.float32),
    ):
        maps = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = maps.new_zeros(classes, shape[1]), maps.new_zeros(classes)
        yield _name("pooled_linear", maps), partial(_there_and_back, maps, weight, bias)
    for width, size, dtype, added, relu in (
        (64, 32, torch.bfloat16, False, False),
        (64, 32, torch.bfloat16, False, True),
        (64, 32, torch.bfloat16, True, True),
        (512, 4, torch.bfloat16, True, True),
        (64, 32, torch.float32, True, True),
    ):
        maps = _channels_last(128, width, size, size).to(dtype)
        case = "batchnorm" + ", sum" * added + ", relu" * relu
        yield _name(case, maps), partial(_batchnorm, maps, maps if added else None, relu)


def _convolutions() -> Iterator[Launch]:
    for batch, width, size in ((128, 128, 16), (64, 160, 32)):
        maps = _channels_last(batch, width, size, size)
        weight, bias = _channels_last(width, width, 3, 3), maps.new_zeros(width)
        yield _name("conv3x3", maps), partial(conv3x3, maps, weight, bias, maps)
        yield _name("conv3x3 gradient", maps), partial(conv3x3_gradient, maps, weight, maps, maps)
    maps, beside = _channels_last(128, 64, 32, 32), _channels_last(128, 128, 16, 16)
    weights = _channels_last(128, 64, 3, 3), _channels_last(128, 64, 1, 1)
    launch = partial(strided_gradient, beside, weights[0], maps, maps, (beside, weights[1]))
    yield _name("strided_gradient", maps), launch
    launch = partial(strided_conv, maps, weights[0], beside[0, :, 0, 0], weights[1])
    yield _name("strided_conv", maps), launch
    for channels, dtype in ((3, torch.bfloat16), (1, torch.float16)):
        images = torch.zeros(128, channels, 32, 32, dtype=dtype)
        weight = _channels_last(64, 8, 3, 3).to(dtype)
        launch = partial(stem_conv, images, weight, weight[:, 0, 0, 0].clone(), (1, 1), (1, 1))
        yield _name("stem_conv", images), launch
    for size in (16, 32):
        maps, weight = _channels_last(32, 64, size, size), _channels_last(64, 64, 3, 3)
        forward = partial(launch_resident_conv, maps, weight, maps[0, :, 0, 0], maps, None, maps)
        yield _name("resident_conv", maps), partial(forward, gradient=False, programs=132)
        backward = partial(launch_resident_conv, maps, weight, None, maps, maps, maps)
        case = _name("resident_conv gradient", maps)
        yield case, partial(backward, gradient=True, programs=132)


def _steps() -> Iterator[Launch]:
    for step in (linf_step_, l2_step_):
        for dtype in (torch.float32, torch.bfloat16):
            adv = torch.zeros(128, 3, 32, 32)
            grad, nonfinite = adv.to(dtype), torch.zeros((), dtype=torch.int64)
            move = partial(step, adv, grad, adv.clone(), 2 / 255, 8 / 255, nonfinite=nonfinite)
            yield _name(f"{step.__name__} gradient", grad), partial(move, backend="triton")


def _affine_relu(maps: Tensor, residual: Tensor | None) -> None:
    leaf, scale = maps.detach().requires_grad_(), torch.zeros(maps.shape[1])
    outputs = affine_relu_linked(leaf, scale, scale, residual, backend="triton")
    torch.autograd.grad(outputs, leaf, (maps, maps))


def _there_and_back(maps: Tensor, weight: Tensor, bias: Tensor) -> None:
    leaf = maps.requires_grad_()
    logits = pooled_linear(leaf, weight, bias, masks_input=True, backend="triton")
    torch.autograd.grad(logits, leaf, logits.detach())


def _batchnorm(x: Tensor, residual: Tensor | None, relu: bool) -> None:
    """Launch the passes forward and backward."""
    weight, bias, mean, variance = torch.zeros(4, x.shape[1])
    x = x.detach().requires_grad_()
    given = (x, weight, bias, mean, variance, _integers(1)[0], 0.1, 1e-5, residual, relu)
    output = fused_batchnorm(*given, backend="triton")
    output.backward(torch.zeros_like(output))


def _name(op: str, tensor: Tensor) -> str:
    return f"{op} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _channels_last(*shape: int) -> Tensor:
    made = torch.zeros(shape, dtype=torch.bfloat16)
    return made.contiguous(memory_format=torch.channels_last)


def _integers(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)

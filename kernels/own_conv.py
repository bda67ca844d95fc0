"""Which kernel of ours computes a convolution of the attack, if one does.

Each takes some shapes, those that an H100 computes faster by it than by cuDNN and the pass behind
it (docs/kernels.md). They are asked for by backend="triton"; what none of them takes is the
library's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reat_fast.kernels.boxes import dense, why_not
from reat_fast.kernels.conv3x3 import (
    conv3x3,
    conv3x3_gradient,
    conv3x3_pays,
    conv3x3_runs_on,
)
from reat_fast.kernels.stem_conv import stem_conv, stem_conv_runs_on
from reat_fast.kernels.strided_conv import strided_conv, strided_conv_runs_on
from reat_fast.kernels.strided_gradient import strided_gradient, strided_gradient_runs_on
from reat_fast.kernels.triton_support import Backend, is_current, use_triton

Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding, dilation, groups."""
Shortcut = tuple[Tensor, Geometry]
"""Weight and geometry of a convolution without bias."""

SAME = ((1, 1), (1, 1), (1, 1), 1)
HALVED = ((2, 2), (1, 1), (1, 1), 1)
SHORTCUT = ((2, 2), (0, 0), (1, 1), 1)

MEASURED = (9, 0)
"""The compute capability on which they were timed."""


class Beside(NamedTuple):
    """The convolution of a shortcut, and the gradient of its output."""

    grad: Tensor
    weight: Tensor
    geometry: Geometry


def faster_on(device: torch.device) -> bool:
    """Say whether these kernels run on a device and are known to be the faster there."""
    if device.type != "cuda" or why_not(device) is not None or not is_current(device):
        return False
    return torch.cuda.get_device_capability(device) == MEASURED


def own_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    shortcut: Shortcut | None,
    geometry: Geometry,
    backend: Backend,
) -> tuple[Tensor, Tensor | None] | None:
    """Return what conv_relu does, or None where no kernel of ours is to compute it.

    The second is the shortcut's convolution of x, where the same kernel computes it.
    """
    if backend != "triton" or not use_triton(backend, x) or not _alike(x.dtype, (bias, residual)):
        return None
    stride, padding, dilation, groups = _plain(geometry)
    fits = (residual is None or dense(residual)) and _plain(geometry) == SAME
    if fits and conv3x3_runs_on(x, weight) and conv3x3_pays(x, len(weight)):
        return conv3x3(x, weight, bias, residual), None
    fits = residual is None and _plain(geometry) == HALVED
    if fits and strided_conv_runs_on(x, weight):
        near = shortcut[0] if shortcut is not None and _is_shortcut(shortcut, weight) else None
        return strided_conv(x, weight, bias, near)
    fits = residual is None and (dilation, groups) == ((1, 1), 1)
    if fits and stem_conv_runs_on(x, weight, stride, padding):
        return stem_conv(x, weight, bias, stride, padding), None
    return None


def own_gradient(
    masked: Tensor,
    weight: Tensor,
    x: Tensor,
    relu: Tensor | None,
    other: Tensor | None,
    beside: Beside | None,
    geometry: Geometry,
    backend: Backend,
) -> Tensor | None:
    """Return the gradient of x, conv^T(masked, weight) + other + beside's, where relu > 0.

    None where no kernel of ours is to compute it.
    """
    if backend != "triton" or not use_triton(backend, masked):
        return None
    near = [tensor for tensor in (relu, other, *(beside or ())[:2]) if isinstance(tensor, Tensor)]
    if not _alike(masked.dtype, near) or not all(map(dense, near)):
        return None
    channels = weight.shape[1]
    filled = channels != x.shape[1]  # which relu and other are not
    fits = _plain(geometry) == SAME and beside is None and not (filled and near)
    fits = fits and conv3x3_runs_on(masked, weight, gradient=True)
    if fits and conv3x3_pays(masked, channels):
        return conv3x3_gradient(masked, weight, relu, other)[:, : x.shape[1]]
    fits = _plain(geometry) == HALVED and (beside is None or _is_shortcut(beside[1:], weight))
    if fits and strided_gradient_runs_on(masked, weight, x):
        shortcut = None if beside is None else (beside.grad, beside.weight)
        return strided_gradient(masked, weight, relu, other, shortcut)
    return None


def _is_shortcut(shortcut: Shortcut, weight: Tensor) -> bool:
    """Say whether a convolution of stride 2 and that of a shortcut can be computed together."""
    near, geometry = shortcut
    alike = near.shape == (*weight.shape[:2], 1, 1) and near.dtype == weight.dtype and dense(near)
    return alike and _plain(geometry) == SHORTCUT


def _plain(geometry: Geometry) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    stride, padding, dilation, groups = geometry
    return tuple(stride), tuple(padding), tuple(dilation), groups


def _alike(dtype: torch.dtype, tensors: Sequence[Tensor | None]) -> bool:
    return all(tensor is None or tensor.dtype == dtype for tensor in tensors)

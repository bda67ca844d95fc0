"""The projected gradient step of L2 PGD, in place, with one radius and step per sample.

moved = adv + step_size * grad / |grad|_2
adv  <- clamp(clean + (moved - clean) * min(1, eps / |moved - clean|_2), low, high)

A sample without gradient does not move before the projection. Norms are sums in float32, taken
after division by the largest element, so that a gradient of 1e-30 still has a direction. The
kernel adds in another order than PyTorch: for n elements both norms agree to about
(n / block + log2(block)) * 2**-24 of their value, the pixels to that share of step_size + eps and
one rounding of the pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.kernels.linf import check_counter, match_memory
from reat_fast.kernels.triton_support import (
    Backend,
    device_number,
    jit,
    kernel_runs_on,
    tl,
    use_triton,
    wrap_triton,
)


def l2_step_torch_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    eps: Tensor,
    nonfinite: Tensor | None,
    low: float,
    high: float,
) -> None:
    """Take the step in PyTorch: what the kernel is held against, and the CPU path."""
    if adv.numel() == 0:
        return
    if nonfinite is not None:
        nonfinite += grad.isfinite().logical_not().sum()
    per_sample = (-1,) + (1,) * (adv.ndim - 1)
    moved = adv + step_size.view(per_sample) * unit(grad.to(adv.dtype).nan_to_num(0.0, 0.0, 0.0))
    adv.copy_(into_ball(moved, clean, eps.view(per_sample)).clamp_(low, high))


def unit(moves: Tensor) -> Tensor:
    """Give each of the finite moves [B, ...] the L2 length 1; 0 stays 0."""
    per_sample = (-1,) + (1,) * (moves.ndim - 1)
    largest = moves.abs().reshape(len(moves), -1).amax(1).view(per_sample)
    scaled = moves / torch.where(largest > 0, largest, 1)
    length = _norm(scaled)
    return scaled / torch.where(length > 0, length, 1)


def into_ball(images: Tensor, clean: Tensor, eps: float | Tensor) -> Tensor:
    """Bring images [B, ...] that are further than eps from clean back to that distance, in L2."""
    delta = images - clean
    length = _norm(delta)
    projected = clean + delta * (eps / torch.where(length > eps, length, 1))
    return torch.where(length > eps, projected, images)


def _norm(images: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(images.reshape(len(images), -1), dim=1)
    return lengths.view((-1,) + (1,) * (images.ndim - 1))


@jit
def _l2_step_kernel(  # type: ignore[no-untyped-def]
    adv_ptr,
    grad_ptr,
    clean_ptr,
    step_size_ptr,
    eps_ptr,
    nonfinite_ptr,
    low,
    high,
    SIZE: tl.constexpr,
    STEP_STRIDE: tl.constexpr,
    EPS_STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    step_size = tl.load(step_size_ptr + sample * STEP_STRIDE)
    eps = tl.load(eps_ptr + sample * EPS_STRIDE)
    adv_ptr += sample * SIZE
    grad_ptr += sample * SIZE
    clean_ptr += sample * SIZE
    lane = tl.arange(0, BLOCK)

    largest = tl.zeros((BLOCK,), tl.float32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, SIZE, BLOCK):
        raw = tl.load(grad_ptr + first + lane, mask=first + lane < SIZE, other=0.0).to(tl.float32)
        finite = tl.abs(raw) < float("inf")
        largest = tl.maximum(largest, tl.where(finite, tl.abs(raw), 0.0))
        bad += (~finite).to(tl.int32)
    scale = tl.max(largest, axis=0)
    scale = tl.where(scale > 0, scale, 1.0)
    if nonfinite_ptr is not None:
        # Integers: the order of the additions does not change the sum.
        count = tl.sum(bad, axis=0)
        tl.atomic_add(nonfinite_ptr, count.to(tl.int64), mask=count > 0, sem="relaxed")

    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        unit = _unit(grad_ptr, first + lane, scale, SIZE)
        squares += unit * unit
    length = tl.sqrt_rn(tl.sum(squares, axis=0))
    length = tl.where(length > 0, length, 1.0)

    squares = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, SIZE, BLOCK):
        element = first + lane
        clean = tl.load(clean_ptr + element, mask=element < SIZE, other=0.0)
        adv = tl.load(adv_ptr + element, mask=element < SIZE, other=0.0)
        moved = adv + step_size * tl.div_rn(_unit(grad_ptr, element, scale, SIZE), length)
        squares += (moved - clean) * (moved - clean)
    distance = tl.sqrt_rn(tl.sum(squares, axis=0))
    outside = distance > eps
    shrink = tl.div_rn(eps, tl.where(outside, distance, 1.0))

    for first in range(0, SIZE, BLOCK):
        element = first + lane
        clean = tl.load(clean_ptr + element, mask=element < SIZE, other=0.0)
        adv = tl.load(adv_ptr + element, mask=element < SIZE, other=0.0)
        moved = adv + step_size * tl.div_rn(_unit(grad_ptr, element, scale, SIZE), length)
        moved = tl.where(outside, clean + (moved - clean) * shrink, moved)
        # A NaN pixel stays NaN, as in PyTorch, instead of being hidden by the bounds.
        moved = tl.clamp(moved, low, high, propagate_nan=tl.PropagateNan.ALL)
        tl.store(adv_ptr + element, moved, mask=element < SIZE)


@jit
def _unit(grad_ptr, element, scale, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    grad = tl.load(grad_ptr + element, mask=element < SIZE, other=0.0).to(tl.float32)
    return tl.div_rn(tl.where(tl.abs(grad) < float("inf"), grad, 0.0), scale)


@torch.library.triton_op("reat_fast::l2_step_", mutates_args={"adv", "nonfinite"})
def _l2_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: Tensor,
    eps: Tensor,
    nonfinite: Tensor | None,
    low: float,
    high: float,
    block: int,
) -> None:
    if not kernel_runs_on(adv):
        l2_step_torch_(adv, grad, clean, step_size, eps, nonfinite, low, high)
        return
    if adv.numel() == 0:
        return
    wrap_triton(_l2_step_kernel)[(adv.shape[0],)](
        adv,
        grad,
        clean,
        step_size,
        eps,
        nonfinite,
        low,
        high,
        SIZE=adv.numel() // adv.shape[0],
        STEP_STRIDE=step_size.ndim,
        EPS_STRIDE=eps.ndim,
        BLOCK=block,
    )


def l2_step_(
    adv: Tensor,
    grad: Tensor,
    clean: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    *,
    clip: tuple[float, float] = (0.0, 1.0),
    nonfinite: Tensor | None = None,
    backend: Backend = "auto",
    block: int = 512,
) -> None:
    """Move adv by step_size along the gradient, into the L2 ball round clean and into clip.

    Never syncs. Arguments and errors as in `linf.linf_step_`; eps and step_size are L2 lengths over
    a whole sample. Non-finite elements of grad count as zero, and are counted in nonfinite.
    block: elements of a sample that a Triton program holds at a time, a power of two.
    """
    grad, clean = match_memory(adv, grad, clean)
    check_counter(nonfinite, adv)
    step = device_number(step_size, adv, "step_size")
    radius = device_number(eps, adv, "eps")
    with torch.no_grad():
        if use_triton(backend, adv) and adv.dtype == torch.float32:
            _l2_step_(adv, grad, clean, step, radius, nonfinite, *clip, block)
        else:
            l2_step_torch_(adv, grad, clean, step, radius, nonfinite, *clip)

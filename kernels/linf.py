"""The projected sign step of L-infinity PGD, in place, with one radius and step per sample.

adv <- clamp(min(max(adv + step_size * sign(grad), clean - eps), clean + eps), low, high)

in this order, which is that of the official REAT code, so float32 agrees with it to the bit. On a
GPU too: sign(grad) is -1, 0 or 1, so fusing its product with the sum rounds nothing differently.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.kernels.triton_support import (
    Backend,
    cdiv,
    device_number,
    jit,
    kernel_runs_on,
    tl,
    use_triton,
    wrap_triton,
)


def linf_step_torch_(
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
    if nonfinite is not None:
        nonfinite += grad.isfinite().logical_not().sum()
    per_sample = (-1,) + (1,) * (adv.ndim - 1)
    step_size, eps = step_size.view(per_sample), eps.view(per_sample)
    moved = adv + step_size * grad.sign()  # sign() of NaN is 0
    moved = torch.minimum(torch.maximum(moved, clean - eps), clean + eps)
    adv.copy_(moved.clamp_(low, high))


@jit
def _linf_step_kernel(  # type: ignore[no-untyped-def]
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
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    offset = sample * SIZE + element
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    adv = tl.load(adv_ptr + offset, mask=inside, other=0.0)
    clean = tl.load(clean_ptr + offset, mask=inside, other=0.0)
    step_size = tl.load(step_size_ptr + sample * STEP_STRIDE)
    eps = tl.load(eps_ptr + sample * EPS_STRIDE)

    sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
    moved = adv + step_size * sign
    # A NaN pixel stays NaN, as in PyTorch, instead of being hidden by the bounds.
    moved = tl.maximum(moved, clean - eps, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.minimum(moved, clean + eps, propagate_nan=tl.PropagateNan.ALL)
    moved = tl.clamp(moved, low, high, propagate_nan=tl.PropagateNan.ALL)
    tl.store(adv_ptr + offset, moved, mask=inside)
    if nonfinite_ptr is not None:
        bad = tl.sum((~(tl.abs(grad) < float("inf"))).to(tl.int32), axis=0)
        # Integers: the order of the additions does not change the sum.
        tl.atomic_add(nonfinite_ptr, bad.to(tl.int64), mask=bad > 0, sem="relaxed")


@torch.library.triton_op("reat_fast::linf_step_", mutates_args={"adv", "nonfinite"})
def _linf_step_(
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
        linf_step_torch_(adv, grad, clean, step_size, eps, nonfinite, low, high)
        return
    if adv.numel() == 0:
        return
    batch = adv.shape[0]
    size = adv.numel() // batch
    wrap_triton(_linf_step_kernel)[(batch, cdiv(size, block))](
        adv,
        grad,
        clean,
        step_size,
        eps,
        nonfinite,
        low,
        high,
        SIZE=size,
        STEP_STRIDE=step_size.ndim,
        EPS_STRIDE=eps.ndim,
        BLOCK=block,
    )


def linf_step_(
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
    """Move adv up the gradient's sign, inside the ball round clean and inside clip; never syncs.

    adv: float32 [B, ...], contiguous or channels_last, written in place. grad: float32, bfloat16 or
    float16, and clean: float32, both of the shape of adv; another memory format is copied to that
    of adv. step_size, eps: number, 0-dim tensor or [B]; a tensor saves filling one, and is reread
    at every graph replay. nonfinite: int64 0-dim tensor, to which the number of NaN and infinite
    elements of grad is added: a NaN moves nothing, an infinite one moves by its sign.
    block: elements per Triton program, a power of two. float64 always takes the PyTorch form.
    Raises ValueError for a wrong dtype, shape, device or memory format. Source: official REAT PGD.
    """
    grad, clean = match_memory(adv, grad, clean)
    check_counter(nonfinite, adv)
    step = device_number(step_size, adv, "step_size")
    radius = device_number(eps, adv, "eps")
    with torch.no_grad():
        if use_triton(backend, adv) and adv.dtype == torch.float32:
            _linf_step_(adv, grad, clean, step, radius, nonfinite, *clip, block)
        else:
            linf_step_torch_(adv, grad, clean, step, radius, nonfinite, *clip)


def match_memory(adv: Tensor, grad: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """Check the tensors of a step, and return grad and clean in the memory format of adv.

    Kernels read a sample as one run of memory. Raises ValueError.
    """
    if adv.ndim == 0 or adv.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"adv is {adv.dtype} of shape {tuple(adv.shape)}: adversarial images are float32 "
            "[B, ...], since a step is finer than the steps of bfloat16"
        )
    if clean.dtype != adv.dtype or not grad.is_floating_point():
        raise ValueError(
            f"clean is {clean.dtype} and grad {grad.dtype}: give clean as {adv.dtype}, like adv, "
            "and a floating point grad"
        )
    for name, tensor in (("grad", grad), ("clean", clean)):
        if tensor.shape != adv.shape or tensor.device != adv.device:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} on {tensor.device}, adv {tuple(adv.shape)} on "
                f"{adv.device}: give them the same shape and device"
            )
    if adv.is_contiguous():
        memory_format = torch.contiguous_format
    elif adv.ndim == 4 and adv.is_contiguous(memory_format=torch.channels_last):
        memory_format = torch.channels_last
    else:
        raise ValueError("adv is a strided view: call .contiguous() on it before the attack")
    return (
        grad.contiguous(memory_format=memory_format),
        clean.contiguous(memory_format=memory_format),
    )


def check_counter(nonfinite: Tensor | None, adv: Tensor) -> None:
    """Raise ValueError unless nonfinite is None or an int64 number on the device of adv."""
    if nonfinite is not None and (
        nonfinite.dtype != torch.int64 or nonfinite.ndim != 0 or nonfinite.device != adv.device
    ):
        raise ValueError(
            f"nonfinite is {nonfinite.dtype} of shape {tuple(nonfinite.shape)} on "
            f"{nonfinite.device}: give torch.zeros((), dtype=torch.int64, device='{adv.device}')"
        )

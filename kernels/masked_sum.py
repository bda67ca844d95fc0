"""The gradient that arrives at a ReLU, summed over what reads the ReLU and masked, in one pass.

    masked = (first + second) [output > 0]

Autograd makes two passes of it where two operations read the output: a sum, then the mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.kernels.triton_support import Backend, cdiv, jit, tl, use_triton

BLOCK = 1024  # elements of a program: eight of 16 bits for each thread, which are 16 bytes


def masked_sum_torch(
    output: Tensor, first: Tensor, second: Tensor | None, out: Tensor | None
) -> Tensor:
    """Compute it in PyTorch, as autograd does: what the kernel is held against, to the bit."""
    total = first if second is None else torch.add(first, second, out=out)
    if out is None:
        masked: Tensor = torch.ops.aten.threshold_backward(total, output, 0)
        return masked
    torch.ops.aten.threshold_backward.grad_input(total, output, 0, grad_input=out)
    return out


@jit
def _masked_sum_kernel(  # type: ignore[no-untyped-def]
    output_ptr, first_ptr, second_ptr, masked_ptr, size, BLOCK: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < size
    output = tl.load(output_ptr + element, mask=inside, other=0.0)
    first = tl.load(first_ptr + element, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + element, mask=inside, other=0.0).to(tl.float32)
    # Where the output is NaN the gradient passes, as in PyTorch.
    masked = tl.where(output.to(tl.float32) <= 0, 0.0, first + second)
    tl.store(masked_ptr + element, masked.to(masked_ptr.dtype.element_ty), mask=inside)


def masked_sum(
    output: Tensor,
    first: Tensor,
    second: Tensor | None = None,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Return first + second where output is positive, and 0 elsewhere; has no gradient of its own.

    All [B, C, H, W] of one dtype. out: where to write it; `first` itself, say. The kernel sums
    two tensors of float32, bfloat16 or float16 in one memory format; others, and one that has only
    to be masked, take PyTorch's operators. Equal to those to the bit.
    """
    if second is None or not _alike(output, first, second) or not use_triton(backend, output):
        return masked_sum_torch(output, first, second, out)
    masked = torch.empty_like(output) if out is None else out
    size = output.numel()
    if size:
        _masked_sum_kernel[(cdiv(size, BLOCK),)](output, first, second, masked, size, BLOCK=BLOCK)
    return masked


def _alike(output: Tensor, first: Tensor, second: Tensor) -> bool:
    dense = output.is_contiguous() or output.is_contiguous(memory_format=torch.channels_last)
    same = output.stride() == first.stride() == second.stride()
    return dense and same and output.dtype != torch.float64

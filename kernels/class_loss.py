"""Softmax cross-entropy with per-class logit offsets and per-class weights, in one pass.

For a row z of logits with label y, offsets o, weights w, C classes and label smoothing e,
    p = softmax(z + o)                  t_c = (1 - e) w_y [c = y] + (e / C) w_c
    loss = -sum_c t_c log p_c           d loss / d z = p sum_c t_c - t
and "mean" divides the sum over the rows by sum_b w_{y_b}, as torch.nn.functional.cross_entropy
does. Offsets log(n_c) make it balanced softmax, weights make it REAT's re-balancing loss.

The kernel computes loss, gradient and prediction of a row while its logits are in registers. The
sum over the rows is left to torch.sum, whose order is fixed.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from reat_fast.kernels.class_loss_triton import _class_loss_kernel
from reat_fast.kernels.triton_support import (
    Backend,
    cdiv,
    in_loss_precision,
    kernel_runs_on,
    power_of_two,
    use_triton,
    wrap_triton,
)

Reduction = Literal["mean", "sum", "none"]

# Logits a program holds in registers: 8 a thread with 4 warps, two 16-byte loads of float32.
# Chosen from bench.aot, not timed.
BLOCK_ELEMENTS = 1024
# One program holds whole rows: 16 logits a thread with 16 warps; twice as many spill.
MOST_CLASSES = 8192


def class_loss_torch(
    logits: Tensor,
    labels: Tensor,
    *,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute the loss with PyTorch's own operators: the definition, and the path on the CPU."""
    logits = in_loss_precision(logits)
    return F.cross_entropy(
        logits if offsets is None else logits + offsets.to(logits.dtype),
        labels,
        None if weights is None else weights.to(logits.dtype),
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def class_loss_rows_torch(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what the kernel does, by the formulas above."""
    shifted = in_loss_precision(logits)
    classes = logits.shape[1]
    if offsets is not None:
        shifted = shifted + offsets.to(shifted.dtype)
    if weights is not None:
        weights = weights.to(shifted.dtype)
    losses = F.cross_entropy(
        shifted, labels, weights, reduction="none", label_smoothing=label_smoothing
    )
    predictions = logits.argmax(1)
    if not with_gradient:
        return losses, losses.new_empty(0), predictions
    class_weights = shifted.new_ones(classes) if weights is None else weights
    is_label = (labels[:, None] == torch.arange(classes, device=labels.device)).to(shifted.dtype)
    targets = class_weights * (is_label * (1 - label_smoothing) + label_smoothing / classes)
    gradient = shifted.softmax(1) * targets.sum(1, keepdim=True) - targets
    return losses, gradient, predictions


@torch.library.triton_op("reat_fast::class_loss_rows", mutates_args=())
def class_loss_rows(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute each row's loss, its gradient and its prediction in one pass over the logits.

    The arguments are those of `class_loss`, unchecked. Returns the losses [B], the gradient [B, C]
    of each row's loss (empty unless `with_gradient`), both in float32 (float64 logits: float64),
    and the predictions [B], int64. Not differentiable.
    """
    if not kernel_runs_on(logits):
        return class_loss_rows_torch(
            logits, labels, offsets, weights, label_smoothing, with_gradient
        )
    shape = logits.shape if with_gradient else (0,)
    gradient = torch.empty(shape, dtype=torch.float32, device=logits.device)
    losses, predictions = _launch(
        logits, labels, offsets, weights, label_smoothing, gradient, with_gradient
    )
    return losses, gradient, predictions


def _launch(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    gradient: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Run the kernel, which writes into `gradient`; return losses and predictions."""
    batch, classes = logits.shape
    losses = torch.empty(batch, dtype=torch.float32, device=logits.device)
    predictions = torch.empty(batch, dtype=torch.int64, device=logits.device)
    columns = power_of_two(classes)
    rows = max(1, BLOCK_ELEMENTS // columns)
    wrap_triton(_class_loss_kernel)[(cdiv(batch, rows),)](
        logits.contiguous(),
        labels.contiguous(),
        None if offsets is None else offsets.contiguous(),
        None if weights is None else weights.contiguous(),
        losses,
        gradient,
        predictions,
        batch,
        label_smoothing,
        CLASSES=classes,
        SMOOTHED=label_smoothing > 0,
        WITH_GRADIENT=with_gradient,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=max(4, columns // 512),
    )
    return losses, predictions


def class_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    histogram: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute softmax cross-entropy of `logits + offsets`, weighted by class, without a sync.

    `logits` [B, C] float32, bfloat16 or float16 (float64 in PyTorch only); `labels` [B] int64 in
    [0, C); `offsets` and `weights` [C]. Computed in float32. "mean" is the weighted mean of
    torch.nn.functional.cross_entropy, which is NaN where all weights of the batch are zero; "sum"
    and "none" are its too, and take B = 0. `histogram` [C] int64 is counted up in place by each
    row's prediction: the first maximum of the logits without offsets. Only the logits get a
    gradient, and only once.
    Raises ValueError for arguments of another shape or dtype. Source: REAT (arXiv 2307.10205) for
    the weights, balanced softmax (arXiv 2007.10740) for the offsets.
    """
    _check(logits, labels, offsets, weights, label_smoothing, reduction, histogram)
    if not _use_kernel(logits, backend):
        if histogram is not None:
            count_(histogram, logits.argmax(1))
        return class_loss_torch(
            logits,
            labels,
            offsets=offsets,
            weights=weights,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    losses: Tensor
    predictions: Tensor
    losses, _, predictions = _ClassLoss.apply(  # type: ignore[no-untyped-call]
        logits, labels, offsets, weights, label_smoothing, with_gradient
    )
    if histogram is not None:
        count_(histogram, predictions)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if weights is None else losses.sum() / weights[labels].float().sum()


def class_loss_gradient(
    logits: Tensor,
    labels: Tensor,
    *,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Compute the gradient of the sum of class_loss over the rows, [B, C] like the logits.

    The bits that autograd finds, without what an attack does not need: the sum, a gradient of one
    for it, and the product and the rounding behind, four small kernels. Arguments and errors as in
    class_loss; may not sync, and has no gradient of its own.
    """
    _check(logits, labels, offsets, weights, 0.0, "sum", None)
    logits = logits.detach()
    if _use_kernel(logits, backend):
        gradient: Tensor = _gradient_alone(logits, labels, offsets, weights)
        return gradient
    with torch.enable_grad():
        leaf = logits.requires_grad_()
        total = class_loss_torch(leaf, labels, offsets=offsets, weights=weights, reduction="sum")
    return torch.autograd.grad(total, leaf)[0]


@torch.library.triton_op("reat_fast::class_loss_gradient", mutates_args=())
def _gradient_alone(
    logits: Tensor, labels: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> Tensor:
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _launch(logits, labels, offsets, weights, 0.0, gradient, True)
    return gradient


def _use_kernel(logits: Tensor, backend: Backend) -> bool:
    fits = logits.dtype != torch.float64 and logits.shape[1] <= MOST_CLASSES
    if not fits and backend == "triton":
        raise ValueError(
            f"backend='triton' takes float32, bfloat16 or float16 logits of up to {MOST_CLASSES} "
            f"classes, got {logits.dtype} and {logits.shape[1]}: give backend='torch'"
        )
    # Without rows there is no grid to launch; a process may have no share of a short batch.
    return use_triton(backend, logits) and fits and logits.numel() > 0


class _ClassLoss(torch.autograd.Function):
    """Rows' losses and predictions; the gradient was computed with them and waits to be scaled."""

    @staticmethod
    def forward(
        logits: Tensor,
        labels: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        label_smoothing: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows: tuple[Tensor, Tensor, Tensor] = class_loss_rows(
            logits, labels, offsets, weights, label_smoothing, with_gradient
        )
        return rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, gradient, predictions = output
        ctx.mark_non_differentiable(gradient, predictions)
        ctx.save_for_backward(gradient)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        grad_logits = (gradient * grad_losses[:, None]).to(ctx.dtype)
        return grad_logits, None, None, None, None, None


def count_(histogram: Tensor, predictions: Tensor) -> None:
    """Count predictions into the histogram; integers, so the order of the additions is free."""
    histogram.scatter_add_(0, predictions, torch.ones_like(predictions))


def _check(
    logits: Tensor,
    labels: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    label_smoothing: float,
    reduction: str,
    histogram: Tensor | None,
) -> None:
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits: a {type(logits).__name__}; a model has to give them alone")
    filled = logits.ndim == 2 and logits.shape[1] and (len(logits) or reduction != "mean")
    if not filled or not logits.is_floating_point():
        raise ValueError(
            f"logits must be a filled [B, C] tensor of floats, got {logits.dtype} "
            f"{list(logits.shape)}"
        )
    batch, classes = logits.shape
    if labels.shape != (batch,) or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape [{batch}] beside logits {list(logits.shape)}, got "
            f"{labels.dtype} {list(labels.shape)}"
        )
    for name, values in (("offsets", offsets), ("weights", weights), ("histogram", histogram)):
        if values is not None and values.shape != (classes,):
            raise ValueError(
                f"{name} must have shape [{classes}], one value a class, got {list(values.shape)}"
            )
    if histogram is not None and histogram.dtype != torch.int64:
        raise ValueError(f"histogram must be int64, got {histogram.dtype}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction={reduction!r} is unknown: give 'mean', 'sum' or 'none'")

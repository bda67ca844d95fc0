"""REAT's penalty on tail features: signed divergences between tail samples and their batch.

With features f [B, D], p_i = softmax(f_i) held fixed, v_c = sqrt(N / n_c), s_ij = -1 where the
labels of i and j are equal and +1 elsewhere, and T the samples of the classes from C//3*2+1 on,
    pairwise    W_ij = coefficient / (|T| B) [i in T] s_ij (v_{y_i} + v_{y_j})
    official    W_ij = mean_k (pairwise W_ik) / D
    penalty     = sum_ij W_ij KL(p_i || softmax f_j)
                = sum_i (sum_j W_ij) p_i . c_i - sum_j A_j . c_j      A_j = sum_i W_ij p_i
    d penalty / d f_j = (sum_i W_ij) softmax(f_j) - A_j
where c_j = log softmax(f_j) - log softmax(f_0): what all rows have in common cancels in a KL, and
taking it out beforehand keeps the digits that float32 would lose. "official" is the published code:
its nn.KLDivLoss(size_average='none') averages over the whole [B, D] product, so one number per
anchor is all that meets the signs. "pairwise" is what the signs were evidently meant for.

One product A = W^T P thus gives loss and gradient. The kernels make the tiles of W from the labels
and keep nothing larger than the features; the official W has equal columns, and needs only sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from reat_fast.kernels.class_weights import refuse_shares
from reat_fast.kernels.tail_penalty_triton import (
    _anchors_kernel,
    _official_kernel,
    _pairwise_kernel,
)
from reat_fast.kernels.triton_support import (
    Backend,
    cdiv,
    in_loss_precision,
    kernel_runs_on,
    power_of_two,
    use_triton,
    wrap_triton,
)

Form = Literal["official", "pairwise"]

# Features a program of the first kernel holds in registers: twice as many spill on sm_90.
BLOCK_ELEMENTS = 1024
# The tiles of W^T P: [PAIRS, ANCHORS] x [ANCHORS, FEATURES]. 64 is the least number of rows for
# which sm_90 and sm_100 use their own matrix instructions. Chosen from bench.aot, not timed.
BLOCK_PAIRS = 64
BLOCK_FEATURES = 32
BLOCK_ANCHORS = 32
# One program holds whole rows: 16 features a thread with 16 warps.
MOST_FEATURES = 8192


def tail_penalty_torch(
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    form: Form = "official",
    coefficient: float = 1.0,
) -> Tensor:
    """Compute the penalty with PyTorch's own operators: the definition, and the path on the CPU."""
    log_softmax = in_loss_precision(features).log_softmax(1)
    fixed = log_softmax.detach()
    anchors, mixed, _ = _fixed_part(fixed, labels, counts, form, coefficient)
    return anchors - (mixed * (log_softmax - fixed[0])).sum()


def tail_penalty_and_gradient_torch(
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    form: str,
    coefficient: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Compute what the kernels do, by the formulas above."""
    log_softmax = in_loss_precision(features).log_softmax(1)
    anchors, mixed, column_sums = _fixed_part(log_softmax, labels, counts, form, coefficient)
    penalty = anchors - (mixed * (log_softmax - log_softmax[0])).sum()
    if not with_gradient:
        return penalty, log_softmax.new_empty(0)
    return penalty, log_softmax.exp() * column_sums[:, None] - mixed


def _fixed_part(
    log_softmax: Tensor, labels: Tensor, counts: Tensor, form: str, coefficient: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum over the anchors, A and the column sums of W.

    The official W has equal columns and is kept as one [B, 1], which makes A [1, D].
    """
    batch, width = log_softmax.shape
    softmax = log_softmax.exp()
    is_tail = labels >= _first_tail_class(len(counts))
    counts = counts.to(softmax.dtype).clamp(min=1)
    values = (counts.sum() / counts).sqrt()[labels]
    scale = coefficient / (is_tail.sum().clamp(min=1) * batch).to(softmax.dtype)
    if form == "official":
        # Its row sums need no pairs: each sample of the row's own class turns +2v into -2v.
        same_class = torch.zeros_like(counts).scatter_add_(0, labels, torch.ones_like(values))
        row_sums = values * (batch - 4 * same_class[labels]) + values.sum()
        row_sums = torch.where(is_tail, row_sums * scale / width, 0.0)
        weights = row_sums[:, None] / batch
    else:
        signs = 1 - 2 * (labels[:, None] == labels).to(softmax.dtype)
        weights = is_tail[:, None] * signs * (values[:, None] + values) * scale
        row_sums = weights.sum(1)
    anchors = (row_sums * (softmax * (log_softmax - log_softmax[0])).sum(1)).sum()
    with torch.autocast(softmax.device.type, enabled=False):
        mixed = weights.T @ softmax
    return anchors, mixed, weights.sum(0)


@torch.library.triton_op("reat_fast::tail_penalty_and_gradient", mutates_args=())
def tail_penalty_and_gradient(
    features: Tensor,
    labels: Tensor,
    counts: Tensor,
    form: str,
    coefficient: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the penalty and its gradient together.

    The arguments are those of `tail_penalty`, unchecked. Returns the penalty, a scalar, and its
    gradient [B, D] (empty unless `with_gradient`), in float32 (float64 features: float64): the
    official gradient is so small that float16 would lose it before a loss scaler acts. Not
    differentiable.
    """
    if not kernel_runs_on(features):
        return tail_penalty_and_gradient_torch(
            features, labels, counts, form, coefficient, with_gradient
        )
    batch, width = features.shape
    classes = len(counts)
    features, labels, counts = features.contiguous(), labels.contiguous(), counts.contiguous()
    official = form == "official"
    row_tiles = cdiv(batch, BLOCK_PAIRS)
    column_tiles = cdiv(width, BLOCK_FEATURES)
    tiles = column_tiles if official else row_tiles * column_tiles
    normalisers = torch.empty(batch, dtype=torch.float32, device=features.device)
    factors = torch.empty_like(normalisers)
    terms = torch.empty(batch + tiles, dtype=torch.float32, device=features.device)
    gradient = terms.new_empty((batch, width) if with_gradient else 0)
    columns = power_of_two(width)
    rows = max(1, BLOCK_ELEMENTS // columns)
    wrap_triton(_anchors_kernel)[(cdiv(batch, rows),)](
        features,
        labels,
        counts,
        normalisers,
        factors,
        terms,
        batch,
        coefficient,
        WIDTH=width,
        CLASSES=classes,
        FIRST_TAIL=_first_tail_class(classes),
        OFFICIAL=official,
        ROWS=rows,
        COLUMNS=columns,
        BLOCK_CLASSES=power_of_two(classes),
        BLOCK_LABELS=128,
        num_warps=max(4, columns // 512),
    )
    if official:
        wrap_triton(_official_kernel)[(column_tiles,)](
            features,
            normalisers,
            factors,
            terms,
            gradient,
            batch,
            WIDTH=width,
            WITH_GRADIENT=with_gradient,
            ROWS=BLOCK_ANCHORS,
            COLUMNS=BLOCK_FEATURES,
        )
    else:
        wrap_triton(_pairwise_kernel)[(row_tiles, column_tiles)](
            features,
            labels,
            normalisers,
            factors,
            terms,
            gradient,
            batch,
            WIDTH=width,
            FIRST_TAIL=_first_tail_class(classes),
            WITH_GRADIENT=with_gradient,
            ROWS=BLOCK_PAIRS,
            COLUMNS=BLOCK_FEATURES,
            ANCHORS=BLOCK_ANCHORS,
        )
    return terms.sum(), gradient


def tail_penalty(
    features: Tensor,
    labels: Tensor,
    counts: Tensor | Sequence[int],
    *,
    form: Form = "official",
    coefficient: float = 1.0,
    backend: Backend = "auto",
) -> Tensor:
    """Compute REAT's penalty on the features of tail classes, a scalar, without a sync.

    `features` [B, D] float32, bfloat16 or float16 (float64 in PyTorch only); `labels` [B] int64 in
    [0, C), named from the largest class to the smallest (ClassStatistics.by_size); `counts` [C]
    training samples of each class, less than 1 taken as 1. Computed in float32. 0 where the batch
    holds no tail class; of three classes none is tail. `coefficient` scales either form: 1 is the
    published size of "official", 1 / D gives "pairwise" about that size. Only the features get a
    gradient, and only once. Raises ValueError for arguments of another shape or dtype, and for
    shares in place of counts. Source: arXiv 2307.10205 and its published code.
    """
    refuse_shares(counts)
    if not isinstance(counts, Tensor):
        counts = torch.tensor(counts, device=features.device)
    _check(features, labels, counts, form)
    fits = features.dtype != torch.float64 and features.shape[1] <= MOST_FEATURES
    if not fits and backend == "triton":
        raise ValueError(
            f"backend='triton' takes float32, bfloat16 or float16 features of up to "
            f"{MOST_FEATURES} columns, got {features.dtype} {list(features.shape)}: "
            "give backend='torch'"
        )
    if not (use_triton(backend, features) and fits):
        return tail_penalty_torch(features, labels, counts, form=form, coefficient=coefficient)
    with_gradient = features.requires_grad and torch.is_grad_enabled()
    penalty: Tensor
    penalty, _ = _TailPenalty.apply(  # type: ignore[no-untyped-call]
        features, labels, counts, form, coefficient, with_gradient
    )
    return penalty


class _TailPenalty(torch.autograd.Function):
    """The penalty; the gradient was computed with it and waits to be scaled."""

    @staticmethod
    def forward(
        features: Tensor,
        labels: Tensor,
        counts: Tensor,
        form: Form,
        coefficient: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = tail_penalty_and_gradient(
            features, labels, counts, form, coefficient, with_gradient
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _, gradient = output
        ctx.mark_non_differentiable(gradient)
        ctx.save_for_backward(gradient)
        ctx.dtype = inputs[0].dtype

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_penalty: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_penalty).to(ctx.dtype), None, None, None, None, None


def _first_tail_class(classes: int) -> int:
    """Return where the published code's tail begins: not 2 C / 3, but one class further."""
    return classes // 3 * 2 + 1


def _check(features: Tensor, labels: Tensor, counts: Tensor, form: str) -> None:
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise ValueError(
            f"features must be a filled [B, D] tensor of floats, got {features.dtype} "
            f"{list(features.shape)}"
        )
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape [{len(features)}] beside features "
            f"{list(features.shape)}, got {labels.dtype} {list(labels.shape)}"
        )
    if counts.ndim != 1 or len(counts) == 0:
        raise ValueError(f"counts must have shape [C], got {list(counts.shape)}")
    if form not in ("official", "pairwise"):
        raise ValueError(f"form={form!r} is unknown: give 'official' or 'pairwise'")

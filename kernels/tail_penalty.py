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

from reat_fast.kernels.triton_support import (
    Backend,
    cdiv,
    in_loss_precision,
    jit,
    kernel_runs_on,
    tl,
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


@jit
def _anchors_kernel(  # type: ignore[no-untyped-def]
    features_ptr,  # [batch, WIDTH]
    labels_ptr,  # [batch]
    counts_ptr,  # [CLASSES]
    normalisers_ptr,  # [batch]: log sum exp of each row
    factors_ptr,  # [batch]: official W_i, pairwise v_i times its scale
    terms_ptr,  # [batch + programs of the kernel that follows]: this one fills [:batch]
    batch,
    coefficient,
    WIDTH: tl.constexpr,
    CLASSES: tl.constexpr,
    FIRST_TAIL: tl.constexpr,
    OFFICIAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_LABELS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_exists = rows < batch
    labels = tl.load(labels_ptr + rows, mask=row_exists, other=0).to(tl.int32)
    classes = tl.arange(0, BLOCK_CLASSES)
    counts = tl.load(counts_ptr + classes, mask=classes < CLASSES, other=0).to(tl.float32)
    total = tl.sum(tl.where(classes < CLASSES, tl.maximum(counts, 1.0), 0.0), axis=0)
    values = _label_values(counts_ptr, labels, row_exists, total, CLASSES)

    value_sum = 0.0
    tail_samples = 0
    same_class = tl.zeros((ROWS,), dtype=tl.int32)
    for start in range(0, batch, BLOCK_LABELS):
        others = start + tl.arange(0, BLOCK_LABELS)
        other_exists = others < batch
        other_labels = tl.load(labels_ptr + others, mask=other_exists, other=-1).to(tl.int32)
        value_sum += tl.sum(_label_values(counts_ptr, other_labels, other_exists, total, CLASSES))
        tail_samples += tl.sum((other_labels >= FIRST_TAIL).to(tl.int32))
        same_class += tl.sum((labels[:, None] == other_labels[None, :]).to(tl.int32), axis=1)

    scale = coefficient / (tl.maximum(tail_samples, 1) * batch).to(tl.float32)
    # Each sample of the row's own class turns +2v into -2v.
    row_sums = values * (batch - 4 * same_class).to(tl.float32) + value_sum
    row_sums = tl.where(labels >= FIRST_TAIL, row_sums * scale, 0.0)
    if OFFICIAL:
        row_sums = row_sums / WIDTH
        factors = row_sums / batch
    else:
        factors = values * scale

    columns = tl.arange(0, COLUMNS)
    column_exists = columns < WIDTH
    infinity = float("inf")
    first = tl.load(features_ptr + columns, mask=column_exists, other=-infinity).to(tl.float32)
    maximum = tl.max(first, axis=0)
    first -= maximum + tl.log(tl.sum(tl.exp(first - maximum), axis=0))
    features = tl.load(
        features_ptr + rows[:, None] * WIDTH + columns[None, :],
        mask=row_exists[:, None] & column_exists[None, :],
        other=-infinity,
    ).to(tl.float32)
    maxima = tl.max(features, axis=1)
    normalisers = maxima + tl.log(tl.sum(tl.exp(features - maxima[:, None]), axis=1))
    log_softmax = features - normalisers[:, None]
    centred = tl.where(column_exists[None, :], log_softmax - first[None, :], 0.0)
    terms = row_sums * tl.sum(tl.exp(log_softmax) * centred, axis=1)
    tl.store(normalisers_ptr + rows, normalisers, mask=row_exists)
    tl.store(factors_ptr + rows, factors, mask=row_exists)
    tl.store(terms_ptr + rows, terms, mask=row_exists)


@jit
def _label_values(counts_ptr, labels, exists, total, CLASSES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return v of each label, 0 beyond the batch, NaN where the label is no class."""
    known = (labels >= 0) & (labels < CLASSES)
    counts = tl.load(counts_ptr + labels, mask=exists & known, other=1).to(tl.float32)
    values = tl.sqrt(total / tl.maximum(counts, 1.0))
    return tl.where(exists, tl.where(known, values, float("nan")), 0.0)


@jit
def _official_kernel(  # type: ignore[no-untyped-def]
    features_ptr,  # [batch, WIDTH]
    normalisers_ptr,  # [batch]
    factors_ptr,  # [batch]: W_i
    terms_ptr,  # [batch + programs]: one term a program, behind those of the anchors
    gradient_ptr,  # [batch, WIDTH], untouched without WITH_GRADIENT
    batch,
    WIDTH: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    column_exists = columns < WIDTH
    first = tl.load(features_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)
    first -= tl.load(normalisers_ptr)
    mixed = tl.zeros((COLUMNS,), dtype=tl.float32)
    centred = tl.zeros((COLUMNS,), dtype=tl.float32)
    column_sum = 0.0
    for start in range(0, batch, ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        row_exists = rows < batch
        exists = row_exists[:, None] & column_exists[None, :]
        places = rows[:, None] * WIDTH + columns[None, :]
        features = tl.load(features_ptr + places, mask=exists, other=0.0).to(tl.float32)
        normalisers = tl.load(normalisers_ptr + rows, mask=row_exists, other=0.0)
        factors = tl.load(factors_ptr + rows, mask=row_exists, other=0.0)
        log_softmax = features - normalisers[:, None]
        mixed += tl.sum(factors[:, None] * tl.exp(log_softmax), axis=0)
        centred += tl.sum(tl.where(exists, log_softmax - first[None, :], 0.0), axis=0)
        column_sum += tl.sum(factors)
    tl.store(terms_ptr + batch + tl.program_id(0), -tl.sum(mixed * centred))
    if WITH_GRADIENT:
        for start in range(0, batch, ROWS):
            rows = start + tl.arange(0, ROWS).to(tl.int64)
            row_exists = rows < batch
            exists = row_exists[:, None] & column_exists[None, :]
            places = rows[:, None] * WIDTH + columns[None, :]
            features = tl.load(features_ptr + places, mask=exists, other=0.0).to(tl.float32)
            normalisers = tl.load(normalisers_ptr + rows, mask=row_exists, other=0.0)
            gradient = tl.exp(features - normalisers[:, None]) * column_sum - mixed[None, :]
            tl.store(gradient_ptr + places, gradient, mask=exists)


@jit
def _pairwise_kernel(  # type: ignore[no-untyped-def]
    features_ptr,  # [batch, WIDTH]
    labels_ptr,  # [batch]
    normalisers_ptr,  # [batch]
    factors_ptr,  # [batch]: v_i times its scale
    terms_ptr,  # [batch + programs]: one term a program, behind those of the anchors
    gradient_ptr,  # [batch, WIDTH], untouched without WITH_GRADIENT
    batch,
    WIDTH: tl.constexpr,
    FIRST_TAIL: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ANCHORS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_exists = rows < batch
    column_exists = columns < WIDTH
    labels = tl.load(labels_ptr + rows, mask=row_exists, other=-1).to(tl.int32)
    factors = tl.load(factors_ptr + rows, mask=row_exists, other=0.0)
    mixed = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    column_sums = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(0, batch, ANCHORS):
        anchors = start + tl.arange(0, ANCHORS).to(tl.int64)
        anchor_exists = anchors < batch
        anchor_labels = tl.load(labels_ptr + anchors, mask=anchor_exists, other=-1).to(tl.int32)
        anchor_factors = tl.load(factors_ptr + anchors, mask=anchor_exists, other=0.0)
        normalisers = tl.load(normalisers_ptr + anchors, mask=anchor_exists, other=0.0)
        features = tl.load(
            features_ptr + anchors[:, None] * WIDTH + columns[None, :],
            mask=anchor_exists[:, None] & column_exists[None, :],
            other=0.0,
        ).to(tl.float32)
        softmax = tl.exp(features - normalisers[:, None])
        weights = factors[:, None] + anchor_factors[None, :]  # W transposed: [ROWS, ANCHORS]
        weights = tl.where(labels[:, None] == anchor_labels[None, :], -weights, weights)
        weights = tl.where(anchor_labels[None, :] >= FIRST_TAIL, weights, 0.0)
        # Plain TF32 keeps 10 bits, and the gradient is a difference of nearly equal softmaxes.
        mixed = tl.dot(weights, softmax, mixed, input_precision="tf32x3")
        column_sums += tl.sum(weights, axis=1)

    exists = row_exists[:, None] & column_exists[None, :]
    places = rows[:, None] * WIDTH + columns[None, :]
    features = tl.load(features_ptr + places, mask=exists, other=0.0).to(tl.float32)
    normalisers = tl.load(normalisers_ptr + rows, mask=row_exists, other=0.0)
    log_softmax = features - normalisers[:, None]
    first = tl.load(features_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)
    first -= tl.load(normalisers_ptr)
    terms = tl.where(exists, mixed * (log_softmax - first[None, :]), 0.0)
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(terms_ptr + batch + program, -tl.sum(terms))
    if WITH_GRADIENT:
        gradient = tl.exp(log_softmax) * column_sums[:, None] - mixed
        tl.store(gradient_ptr + places, gradient, mask=exists)


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
    columns = 1 << (width - 1).bit_length()
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
        BLOCK_CLASSES=1 << (classes - 1).bit_length(),
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
    gradient, and only once. Raises ValueError for arguments of another shape or dtype. Source:
    arXiv 2307.10205 and its published code.
    """
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

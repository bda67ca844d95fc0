"""The kernels of the tail penalty; reat_fast.kernels.tail_penalty has the maths and launches them.

The first one finds what each row needs of its own: the normaliser of its softmax, its factor and
its term as an anchor. The second makes A from the tiles of W, column by column, and with it the
other terms and the gradient: one form of it for each form of the penalty.
"""

from __future__ import annotations

from reat_fast.kernels.triton_support import jit, tl


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

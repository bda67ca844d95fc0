"""The kernel of the class loss; reat_fast.kernels.class_loss has the maths and launches it.

A program holds whole rows of logits in registers, so that loss, gradient and prediction of a row
take one read of it.
"""

from __future__ import annotations

from reat_fast.kernels.triton_support import jit, tl


@jit
def _class_loss_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [batch, CLASSES]
    labels_ptr,  # [batch]
    offsets_ptr,  # [CLASSES] or None
    weights_ptr,  # [CLASSES] or None
    losses_ptr,  # [batch]
    gradient_ptr,  # [batch, CLASSES], untouched without WITH_GRADIENT
    predictions_ptr,  # [batch]
    batch,
    label_smoothing,
    CLASSES: tl.constexpr,
    SMOOTHED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    row_exists = rows < batch
    column_exists = columns < CLASSES
    exists = row_exists[:, None] & column_exists[None, :]
    places = rows[:, None] * CLASSES + columns[None, :]
    infinity = float("inf")
    logits = tl.load(logits_ptr + places, mask=exists, other=-infinity).to(tl.float32)
    labels = tl.load(labels_ptr + rows, mask=row_exists, other=0)

    # As torch.argmax: the first NaN where there is one, else the first maximum.
    maximum = tl.max(logits, axis=1)
    order = tl.where(logits == maximum[:, None], columns[None, :] + COLUMNS, 2 * COLUMNS)
    order = tl.where(logits != logits, columns[None, :], order)
    predictions = tl.min(order, axis=1) % COLUMNS
    tl.store(predictions_ptr + rows, predictions.to(tl.int64), mask=row_exists)

    if offsets_ptr is not None:
        offsets = tl.load(offsets_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)
        logits += offsets[None, :]
        maximum = tl.max(logits, axis=1)
    logits -= maximum[:, None]
    log_probabilities = logits - tl.log(tl.sum(tl.exp(logits), axis=1))[:, None]

    is_label = columns[None, :] == labels[:, None]
    if weights_ptr is not None:
        weights = tl.load(weights_ptr + columns, mask=column_exists, other=0.0).to(tl.float32)
        label_weights = tl.sum(tl.where(is_label, weights[None, :], 0.0), axis=1)
    else:
        weights = tl.where(column_exists, 1.0, 0.0)
        label_weights = tl.full((ROWS,), 1.0, tl.float32)
    # A label outside [0, CLASSES) matches no column: it must not pass for a loss of zero.
    known = (labels >= 0) & (labels < CLASSES)
    label_weights = tl.where(known, label_weights, float("nan"))
    losses = -label_weights * tl.sum(tl.where(is_label, log_probabilities, 0.0), axis=1)
    target_sums = label_weights
    if SMOOTHED:
        label_weights *= 1.0 - label_smoothing
        shares = weights * (label_smoothing / CLASSES)
        smooth = tl.where(column_exists[None, :], shares[None, :] * log_probabilities, 0.0)
        losses = (1.0 - label_smoothing) * losses - tl.sum(smooth, axis=1)
        target_sums = label_weights + tl.sum(shares, axis=0)
    tl.store(losses_ptr + rows, losses, mask=row_exists)

    if WITH_GRADIENT:
        gradient = tl.exp(log_probabilities) * target_sums[:, None]
        gradient -= tl.where(is_label, label_weights[:, None], 0.0)
        if SMOOTHED:
            gradient -= shares[None, :]
        tl.store(gradient_ptr + places, gradient.to(gradient_ptr.dtype.element_ty), mask=exists)

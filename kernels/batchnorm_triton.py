"""The kernels of BatchNorm; reat_fast.kernels.batchnorm has the maths and launches them.

Images are a matrix of pixels and channels, and tiles ROWS times COLUMNS of it. A program sums the
tiles of one chunk of rows; a kernel of its own joins the sums of all chunks for each channel.
"""

from __future__ import annotations

from reat_fast.kernels.triton_support import jit, tl


@jit
def _places(size, channels, steps, step, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return where the tile of a step lies in [size, channels], and what of it exists."""
    first = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS
    rows = first + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < size)[:, None] & (columns < channels)[None, :]
    return rows[:, None] * channels + columns[None, :], inside


@jit
def _affine(away, rstd, weight, bias):  # type: ignore[no-untyped-def]
    """Scale x - mean and shift it; one rounding each, so that the mask is that of the forward."""
    return tl.fma(away, tl.broadcast_to((rstd * weight)[None, :], away.shape), bias[None, :])


@jit
def _join(means, squares, counts, number):  # type: ignore[no-untyped-def]
    """Join means and squared deviations over the rows by Chan's formula."""
    mean = tl.sum(means * counts, axis=0) / number
    mean += tl.sum((means - mean[None, :]) * counts, axis=0) / number  # what rounding took
    away = means - mean[None, :]
    return mean, tl.sum(squares + counts * away * away, axis=0)


@jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    x_ptr,  # [size, channels]
    parts_ptr,  # [2, chunks, channels]: means and squared deviations of each chunk of rows
    size,
    channels,
    steps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    means = tl.zeros((ROWS, COLUMNS), tl.float32)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        places, inside = _places(size, channels, steps, step, ROWS, COLUMNS)
        x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        away = tl.where(inside, x - means, 0.0)
        # Rows that end earlier are left alone, so all that are met have met as many.
        means += away * (1.0 / (step + 1))
        squares += away * (x - means)
    first = tl.program_id(0).to(tl.int64) * steps * ROWS
    left = size - first - tl.arange(0, ROWS)
    counts = tl.minimum(tl.maximum((left + ROWS - 1) // ROWS, 0), steps).to(tl.float32)[:, None]
    mean, squared = _join(means, squares, counts, tl.sum(counts))
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(0).to(tl.int64) * channels + columns
    known = columns < channels
    tl.store(parts_ptr + part, mean, mask=known)
    tl.store(parts_ptr + tl.num_programs(0) * channels + part, squared, mask=known)


@jit
def _join_statistics_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    mean_ptr,  # [channels]
    rstd_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    size,
    channels,
    chunks,
    chunk_rows,
    momentum,
    eps,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.arange(0, CHUNKS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < channels
    inside = (chunk < chunks)[:, None] & known[None, :]
    places = chunk[:, None] * channels + columns[None, :]
    means = tl.load(parts_ptr + places, mask=inside, other=0.0)
    squares = tl.load(parts_ptr + chunks * channels + places, mask=inside, other=0.0)
    counts = tl.minimum(tl.maximum(size - chunk.to(tl.int64) * chunk_rows, 0), chunk_rows)
    counts = counts.to(tl.float32)[:, None]
    number = size.to(tl.float32)
    mean, squared = _join(means, squares, counts, number)
    tl.store(mean_ptr + columns, mean, mask=known)
    tl.store(rstd_ptr + columns, tl.div_rn(1.0, tl.sqrt_rn(squared / number + eps)), mask=known)
    before = tl.load(running_mean_ptr + columns, mask=known, other=0.0)
    tl.store(running_mean_ptr + columns, before + momentum * (mean - before), mask=known)
    before = tl.load(running_var_ptr + columns, mask=known, other=0.0)
    unbiased = squared / (number - 1.0)
    tl.store(running_var_ptr + columns, before + momentum * (unbiased - before), mask=known)
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)


@jit
def _normalise_kernel(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,  # or None
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    size,
    channels,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    places, inside = _places(size, channels, 1, 0, ROWS, COLUMNS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < channels
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + columns, mask=known, other=0.0)
    rstd = tl.load(rstd_ptr + columns, mask=known, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=known, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=known, other=0.0)
    output = _affine(x - mean[None, :], rstd, weight, bias)
    if residual_ptr is not None:
        output += tl.load(residual_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        output = tl.where(output <= 0, 0.0, output)  # NaN stays, as in PyTorch
    tl.store(output_ptr + places, output.to(output_ptr.dtype.element_ty), mask=inside)


@jit
def _gradient_sums_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,
    x_ptr,
    output_ptr,  # read where MASK is 2, as masked_ptr is written
    masked_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    parts_ptr,  # [2, chunks, channels]: sums of g and of g (x - mean)
    size,
    channels,
    steps,
    MASK: tl.constexpr,  # 0: no ReLU; 1: computed from x; 2: from the output, for a residual
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < channels
    mean = tl.load(mean_ptr + columns, mask=known, other=0.0)
    if MASK == 1:
        rstd = tl.load(rstd_ptr + columns, mask=known, other=0.0)
        weight = tl.load(weight_ptr + columns, mask=known, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=known, other=0.0)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    products = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in range(steps):
        places, inside = _places(size, channels, steps, step, ROWS, COLUMNS)
        gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
        away = x - mean[None, :]
        if MASK == 1:
            output = _affine(away, rstd, weight, bias).to(x_ptr.dtype.element_ty).to(tl.float32)
            gradient = tl.where(output <= 0, 0.0, gradient)
        if MASK == 2:
            output = tl.load(output_ptr + places, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.where(output <= 0, 0.0, gradient)
            tl.store(masked_ptr + places, gradient.to(masked_ptr.dtype.element_ty), mask=inside)
        sums += gradient
        products += tl.where(inside, gradient * away, 0.0)
    part = tl.program_id(0).to(tl.int64) * channels + columns
    tl.store(parts_ptr + part, tl.sum(sums, axis=0), mask=known)
    beside = tl.num_programs(0) * channels
    tl.store(parts_ptr + beside + part, tl.sum(products, axis=0), mask=known)


@jit
def _join_gradients_kernel(  # type: ignore[no-untyped-def]
    parts_ptr,
    rstd_ptr,
    of_weight_ptr,  # [channels]
    of_bias_ptr,
    channels,
    chunks,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.arange(0, CHUNKS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < channels
    inside = (chunk < chunks)[:, None] & known[None, :]
    places = chunk[:, None] * channels + columns[None, :]
    sums = tl.load(parts_ptr + places, mask=inside, other=0.0)
    products = tl.load(parts_ptr + chunks * channels + places, mask=inside, other=0.0)
    rstd = tl.load(rstd_ptr + columns, mask=known, other=0.0)
    tl.store(of_bias_ptr + columns, tl.sum(sums, axis=0), mask=known)
    tl.store(of_weight_ptr + columns, tl.sum(products, axis=0) * rstd, mask=known)


@jit
def _input_gradient_kernel(  # type: ignore[no-untyped-def]
    gradient_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    of_weight_ptr,
    of_bias_ptr,
    of_x_ptr,
    size,
    channels,
    MASK: tl.constexpr,  # 1: computed from x; otherwise the gradient is masked already
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    places, inside = _places(size, channels, 1, 0, ROWS, COLUMNS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = columns < channels
    gradient = tl.load(gradient_ptr + places, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + places, mask=inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + columns, mask=known, other=0.0)
    rstd = tl.load(rstd_ptr + columns, mask=known, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=known, other=0.0)
    away = x - mean[None, :]
    if MASK == 1:
        bias = tl.load(bias_ptr + columns, mask=known, other=0.0)
        output = _affine(away, rstd, weight, bias).to(x_ptr.dtype.element_ty).to(tl.float32)
        gradient = tl.where(output <= 0, 0.0, gradient)
    number = size.to(tl.float32)
    shift = tl.load(of_bias_ptr + columns, mask=known, other=0.0) / number
    slope = tl.load(of_weight_ptr + columns, mask=known, other=0.0) * rstd / number
    of_x = (rstd * weight)[None, :] * (gradient - shift[None, :] - away * slope[None, :])
    tl.store(of_x_ptr + places, of_x.to(of_x_ptr.dtype.element_ty), mask=inside)

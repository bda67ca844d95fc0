"""One operation of an augmentation policy on one image: the Triton form of `augment.operate`.

The operation is a number that the program loaded, so it does that one and no other. Whole numbers
stay integers. Where Pillow rounds, in the spread of AutoContrast and in blends, products are kept
from being fused with sums (`_unfused`): so the pixels are those of the PyTorch form, to the bit.
"""

from __future__ import annotations

from reat_fast.kernels.augment import BLENDS, LOOKUPS, OPERATIONS
from reat_fast.kernels.triton_support import jit, tl

# The first of each kind, and those that are unlike the others of their kind.
_BLEND = tl.constexpr(OPERATIONS.index(BLENDS[0]))
_LOOKUP = tl.constexpr(OPERATIONS.index(LOOKUPS[0]))
_COLOR = tl.constexpr(OPERATIONS.index("Color"))
_CONTRAST = tl.constexpr(OPERATIONS.index("Contrast"))
_SHARPNESS = tl.constexpr(OPERATIONS.index("Sharpness"))
_AUTO_CONTRAST = tl.constexpr(OPERATIONS.index("AutoContrast"))
_EQUALIZE = tl.constexpr(OPERATIONS.index("Equalize"))


@jit
def operate_on_image(  # type: ignore[no-untyped-def]
    image,
    augmented,
    operation,
    matrix_ptr,
    lookup_ptr,
    factor_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Do an operation on an image [H, W, C], uint8, and write it elsewhere, BLOCK pixels in turn.

    image, augmented: pointers; matrix_ptr, lookup_ptr, factor_ptr: to its row of `Numbers`.
    """
    if operation >= _LOOKUP:
        _look_up(image, augmented, operation, lookup_ptr, HEIGHT * WIDTH, CHANNELS, BLOCK)
    elif operation >= _BLEND:
        factor = tl.load(factor_ptr)
        _blend(image, augmented, operation, factor, HEIGHT, WIDTH, CHANNELS, BLOCK)
    else:
        _move(image, augmented, matrix_ptr, HEIGHT, WIDTH, CHANNELS, BLOCK)


@jit
def _move(  # type: ignore[no-untyped-def]
    image,
    augmented,
    matrix_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    a, b, c = tl.load(matrix_ptr), tl.load(matrix_ptr + 1), tl.load(matrix_ptr + 2)
    d, e, f = tl.load(matrix_ptr + 3), tl.load(matrix_ptr + 4), tl.load(matrix_ptr + 5)
    for first in range(0, HEIGHT * WIDTH, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < HEIGHT * WIDTH
        x = place % WIDTH
        y = place // WIDTH
        column = (a * x + b * y + c) >> 16
        row = (d * x + e * y + f) >> 16
        visible = inside & (column >= 0) & (column < WIDTH) & (row >= 0) & (row < HEIGHT)
        for channel in range(CHANNELS):
            source = image + (row * WIDTH + column) * CHANNELS + channel
            level = tl.load(source, mask=visible, other=0)
            tl.store(augmented + place * CHANNELS + channel, level, mask=inside)


@jit
def _look_up(  # type: ignore[no-untyped-def]
    image,
    augmented,
    operation,
    lookup_ptr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for channel in range(CHANNELS):
        table = tl.load(lookup_ptr + tl.arange(0, 256)).to(tl.int32)
        if (operation == _AUTO_CONTRAST) | (operation == _EQUALIZE):
            counts = tl.zeros([256], tl.int32)
            for first in range(0, PIXELS, BLOCK):
                level, inside = _levels(image + channel, first, PIXELS, CHANNELS, BLOCK)
                counts += tl.histogram(level, 256, mask=inside)
            table = _own_table(counts, operation, PIXELS)
        for first in range(0, PIXELS, BLOCK):
            level, inside = _levels(image + channel, first, PIXELS, CHANNELS, BLOCK)
            place = first + tl.arange(0, BLOCK)
            target = augmented + place * CHANNELS + channel
            tl.store(target, tl.gather(table, level, 0).to(tl.uint8), mask=inside)


@jit
def _levels(plane, first, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read levels of one channel, int32, 0 beyond the image; and say which are not."""
    place = first + tl.arange(0, BLOCK)
    inside = place < PIXELS
    return tl.load(plane + place * CHANNELS, mask=inside, other=0).to(tl.int32), inside


@jit
def _own_table(counts, operation, PIXELS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Make the table of AutoContrast or Equalize from how often a channel has each level."""
    levels = tl.arange(0, 256)
    high = tl.max(tl.where(counts > 0, levels, 0), axis=0)
    table = levels
    if operation == _EQUALIZE:
        step = (PIXELS - tl.sum(tl.where(levels == high, counts, 0), axis=0)) // 255
        below = tl.cumsum(counts, axis=0) - counts
        if step > 0:
            table = tl.minimum((step // 2 + below) // step, 255)
    else:
        low = tl.min(tl.where(counts > 0, levels, 255), axis=0)
        if high > low:
            scale = 255.0 / (high - low).to(tl.float64)
            spread = _unfused(levels.to(tl.float64) * scale) + _unfused(-low.to(tl.float64) * scale)
            table = tl.minimum(tl.maximum(spread.to(tl.int32), 0), 255)
    return table


@jit
def _blend(  # type: ignore[no-untyped-def]
    image,
    augmented,
    operation,
    factor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    mean = tl.full([], 0, tl.int32)
    if operation == _CONTRAST:
        total = tl.full([], 0, tl.int64)
        for first in range(0, PIXELS, BLOCK):
            total += tl.sum(_grey(image, first, PIXELS, CHANNELS, BLOCK), axis=0)
        mean = ((2 * total + PIXELS) // (2 * PIXELS)).to(tl.int32)  # rounded
    for first in range(0, PIXELS, BLOCK):
        plain = tl.full([BLOCK], 0, tl.int32) + mean
        if operation == _COLOR:
            plain = _grey(image, first, PIXELS, CHANNELS, BLOCK)
        for channel in range(CHANNELS):
            level, inside = _levels(image + channel, first, PIXELS, CHANNELS, BLOCK)
            if operation == _SHARPNESS:
                plain = _smooth(image + channel, level, first, HEIGHT, WIDTH, CHANNELS, BLOCK)
            beyond = _unfused(factor * (level - plain).to(tl.float32))
            blended = tl.clamp(plain.to(tl.float32) + beyond, 0.0, 255.0)
            target = augmented + (first + tl.arange(0, BLOCK)) * CHANNELS + channel
            tl.store(target, blended.to(tl.uint8), mask=inside)


@jit
def _grey(image, first, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the luma of ITU-R 601, int32, 0 beyond the image."""
    grey, _ = _levels(image, first, PIXELS, CHANNELS, BLOCK)
    if CHANNELS == 3:
        green, _ = _levels(image + 1, first, PIXELS, CHANNELS, BLOCK)
        blue, _ = _levels(image + 2, first, PIXELS, CHANNELS, BLOCK)
        grey = (19595 * grey + 38470 * green + 7471 * blue + 32768) >> 16
    return grey


@jit
def _smooth(  # type: ignore[no-untyped-def]
    plane,
    level,
    first,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return rounded means over 3x3 pixels, the middle one counted five times; borders stay."""
    place = first + tl.arange(0, BLOCK)
    x = place % WIDTH
    y = place // WIDTH
    middle = (x > 0) & (x < WIDTH - 1) & (y > 0) & (y < HEIGHT - 1)
    total = 4 * level
    for near in tl.static_range(9):
        beside = plane + (place + (near // 3 - 1) * WIDTH + near % 3 - 1) * CHANNELS
        total += tl.load(beside, mask=middle, other=0).to(tl.int32)
    return tl.where(middle, (2 * total + 13) // 26, level)


@jit
def _unfused(product):  # type: ignore[no-untyped-def]
    """Return a product, below 2**16, as it is: one fused with a sum would not be rounded."""
    return tl.minimum(product, 65536.0)

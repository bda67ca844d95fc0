"""One operation of an augmentation policy on each image of a batch, another on each if need be.

Three passes over all images: move the pixels (one affine map), look their levels up (one table per
channel), blend with a plainer image. The operation of an image only chooses the numbers, and the
passes that are not its own are exact identities; so shapes are static, nothing waits for the
device, and a CUDA graph can hold it.

Levels stay whole numbers, in float32, and the arithmetic is Pillow's: places in 16.16 fixed point,
tables in float64, blends in float32. `torch.compile` may fuse a multiplication and an addition, and
then differ by one level; the Triton form, `augment_triton`, does not.

Source: Pillow ImageOps.py, ImageEnhance.py, Geometry.c, Blend.c, Filter.c, Convert.c.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
BLENDS = ("Brightness", "Color", "Contrast", "Sharpness")
LOOKUPS = ("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")
OPERATIONS = ("Identity", *MOVES, *BLENDS, *LOOKUPS)


class Numbers(NamedTuple):
    """What operations need to know, one row [R] for each or, of tensors indexed, each image [B]."""

    operation: Tensor  # int64 [R], positions in OPERATIONS
    matrix: Tensor  # int64 [R, 6], from places in the output to places in the input, 16.16
    lookup: Tensor  # float32 [R, 256], what becomes of each level
    factor: Tensor  # float32 [R], 1 where nothing is blended


def numbers(
    name: str, value: float, height: int, width: int
) -> tuple[int, list[int], list[int], float]:
    """Return a row of Numbers, on the host.

    value: slope of a shear, pixels of a translation, degrees of a rotation (counter-clockwise),
    bits that posterize keeps, threshold of solarize; of a blend, what its factor is above 1.
    """
    factor = 1 + value if name in BLENDS else 1.0
    return OPERATIONS.index(name), _matrix(name, value, height, width), _lookup(name, value), factor


def operate(pixels: Tensor, rows: Numbers) -> Tensor:
    """Do one operation on each image; never syncs.

    pixels: float32 [B, C, H, W], contiguous, whole numbers in 0..255, C = 1 or 3; rows: one for
    each image. Color leaves grey images as they are. Returns new pixels of the same kind.
    """
    pixels = _moved(pixels, rows.matrix)
    pixels = _looked_up(pixels, rows.operation[:, None, None], rows.lookup[:, None])
    return _blended(pixels, rows.operation[:, None, None, None], rows.factor[:, None, None, None])


def _matrix(name: str, value: float, height: int, width: int) -> list[int]:
    across, down = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    match name:
        case "ShearX":
            across[1] = value
        case "ShearY":
            down[0] = value
        case "TranslateX":
            across[2] = -int(value)
        case "TranslateY":
            down[2] = -int(value)
        case "Rotate":
            cos, sin = math.cos(math.radians(value)), math.sin(math.radians(value))
            x, y = width / 2, height / 2
            across, down = [cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]
    # The map takes centres of pixels, which lie half a pixel from their corners.
    return [
        math.floor(number * 2**16 + 0.5)
        for a, b, c in (across, down)
        for number in (a, b, c + a / 2 + b / 2)
    ]


def _lookup(name: str, value: float) -> list[int]:
    match name:
        case "Posterize":
            return [level & (256 - 2 ** (8 - int(value))) for level in range(256)]
        case "Solarize":
            return [level if level < value else 255 - level for level in range(256)]
        case "Invert":
            return [255 - level for level in range(256)]
        case _:
            return list(range(256))


def _moved(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Take each pixel from the place in the input that the matrix [B, 6] names, or black."""
    height, width = pixels.shape[2:]
    place = torch.arange(height * width, device=pixels.device)
    x, y = place % width, place // width
    a, b, c, d, e, f = matrix[:, :, None].unbind(1)  # [B, 1] each
    column, row = a * x + b * y + c >> 16, d * x + e * y + f >> 16  # [B, H * W]
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = torch.where(inside, row * width + column, 0)[:, None]
    flat = pixels.flatten(2)
    return (flat.gather(2, source.expand_as(flat)) * inside[:, None]).view_as(pixels)


def _looked_up(pixels: Tensor, operation: Tensor, lookup: Tensor) -> Tensor:
    """Map levels by a table [B, 1, 256], or by one that each channel makes of itself."""
    flat = pixels.flatten(2).long()  # [B, C, H * W]
    low, high = (found[..., None] for found in pixels.flatten(2).aminmax(dim=2))
    stretched = torch.where(_is(operation, "AutoContrast"), _stretched(low, high), lookup)
    lookup = torch.where(_is(operation, "Equalize"), _equalized(flat, high.long()), stretched)
    return lookup.gather(2, flat).view_as(pixels)


def _stretched(low: Tensor, high: Tensor) -> Tensor:
    """Spread low..high over 0..255; [B, C, 256]."""
    levels = torch.arange(256, dtype=torch.float64, device=low.device)
    span = (high - low).clamp(min=1).double()
    scale = torch.full_like(span, 255) / span  # 255 / span would be 255 times its reciprocal
    spread = (levels * scale + -low * scale).trunc().clamp(0, 255)
    return torch.where(high > low, spread, levels).float()


def _equalized(flat: Tensor, high: Tensor) -> Tensor:
    """Give each level the share of pixels below it; [B, C, 256]."""
    levels = torch.arange(256, device=flat.device)
    channels = torch.arange(flat.shape[:2].numel(), device=flat.device)
    # Counted in one long row: only so does a GPU keep the promise of deterministic algorithms.
    places = (flat.flatten(0, 1) + 256 * channels[:, None]).flatten()
    counts = places.new_zeros(256 * len(channels))
    counts = counts.scatter_add(0, places, places.new_ones(()).expand_as(places))
    counts = counts.view(*flat.shape[:2], 256)
    step = (flat.shape[2] - counts.gather(2, high)) // 255  # the highest level is left out
    below = counts.cumsum(2) - counts
    even = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, even.clamp(max=255), levels).float()


def _blended(pixels: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """Go from a plainer image towards the image by a factor [B, 1, 1, 1], or beyond it."""
    grey = _grey(pixels)
    total = grey.sum((2, 3), keepdim=True, dtype=torch.int64)
    count = pixels.shape[2:].numel()
    mean = (2 * total + count) // (2 * count)  # rounded
    plain = torch.where(_is(operation, "Contrast"), mean, 0).float()
    plain = torch.where(_is(operation, "Color"), grey, plain)
    plain = torch.where(_is(operation, "Sharpness"), _smooth(pixels), plain)
    return (plain + factor * (pixels - plain)).clamp(0, 255).trunc()


def _grey(pixels: Tensor) -> Tensor:
    """Return the luma of ITU-R 601, [B, 1, H, W]."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.split(1, dim=1)
    # Whole numbers below 2**24, which float32 holds exactly.
    weighted = 19595 * red + 38470 * green + 7471 * blue
    return torch.floor((weighted + 2**15) / 2**16)


def _smooth(pixels: Tensor) -> Tensor:
    """Return means over 3x3 pixels, the middle one counted five times; borders stay."""
    rows = pixels[:, :, :-2] + pixels[:, :, 1:-1] + pixels[:, :, 2:]
    sums = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:] + 4 * pixels[:, :, 1:-1, 1:-1]
    smooth = pixels.clone()
    # Sums are exact, and 13 is odd: no mean is near a half, where rounding could err.
    smooth[:, :, 1:-1, 1:-1] = (sums / 13 + 0.5).floor()
    return smooth


def _is(operation: Tensor, name: str) -> Tensor:
    return operation == OPERATIONS.index(name)

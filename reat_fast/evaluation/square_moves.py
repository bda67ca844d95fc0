"""Where Square Attack begins and what it tries next, in L-infinity and in L2.

In L-infinity every pixel stays at an end of its range, and a square is brought to one of them. In
L2 a square gets a pattern of two hills, with the energy of a second square, which is emptied, and
what the radius leaves. Each image has squares of its own. Source: Andriushchenko et al., ECCV 2020
(arXiv 1912.00049), algorithms 2 and 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.evaluation.ball import Ball
from reat_fast.kernels import philox

WORDS = {"linf": 4, "l2": 8}
"""Random words of a query: row, column, sign per channel, turned or not, and in L2 row and column
of the square that is emptied; the rest is not used."""
TILES = 5  # down an image, where a search in L2 begins
TINY = 1e-12

Draw = Callable[[int], Tensor]
"""Give so many random words of each image, int64 [B, count]."""


@dataclass(frozen=True)
class Squares:
    """One square in each image of a batch: rows [B, H] and columns [B, W] from its corner on."""

    rows: Tensor
    columns: Tensor
    side: int

    @classmethod
    def draw(cls, words: Tensor, shape: torch.Size, side: int) -> Squares:
        """Place squares of so many pixels a side evenly in images [B, C, H, W]; words [B, 2]."""
        top, left = (
            philox.integers(words[:, k, None], length - side + 1)
            for k, length in enumerate(shape[2:])
        )
        rows, columns = (torch.arange(length, device=words.device) for length in shape[2:])
        return cls(rows - top, columns - left, side)

    def inside(self) -> Tensor:
        """Return which pixels lie in the square, bool [B, 1, H, W]."""
        row, column = ((at >= 0) & (at < self.side) for at in (self.rows, self.columns))
        return (row[:, :, None] & column[:, None, :])[:, None]

    def show(self, patterns: Tensor, chosen: Tensor) -> Tensor:
        """Put patterns[chosen] into the squares, float [B, 1, H, W]; outside is what it may be.

        patterns [P, side, side], chosen int64 [B].
        """
        row, column = (at.clamp(0, self.side - 1) for at in (self.rows, self.columns))
        return patterns[chosen[:, None, None], row[:, :, None], column[:, None, :]][:, None]


def stripes(images: Tensor, words: Draw, ball: Ball) -> Tensor:
    """Begin in L-infinity at vertical stripes: one end of the range per channel and column."""
    batch, channels, _, width = images.shape
    up = philox.bernoulli(words(channels * width), 0.5)
    return _ends(images, up.view(batch, channels, 1, width), ball)


def recoloured(clean: Tensor, best: Tensor, words: Tensor, share: float, ball: Ball) -> Tensor:
    """Bring a square of each image in L-infinity to the ends of its range, a channel to one."""
    height, width = clean.shape[2:]
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    squares = Squares.draw(words[:, :2], clean.shape, side)
    return torch.where(squares.inside(), _ends(clean, _signs(words[:, 2], clean), ball), best)


def tiles(images: Tensor, words: Draw, ball: Ball) -> Tensor:
    """Begin in L2 at tiles of two hills each, a sign per tile and channel, some of them turned."""
    batch, channels, height, width = images.shape
    side = min(max(height // TILES, 1), width)
    down, across = height // side, width // side
    coins = philox.bernoulli(words((channels + 1) * down * across), 0.5)
    coins = coins.view(batch, channels + 1, down, across)
    hills = _both_ways(side, images)[coins[:, :1].long()]  # [B, 1, down, across, side, side]
    tiled = torch.where(coins[:, 1:, :, :, None, None], hills, -hills)
    tiled = tiled.transpose(3, 4).reshape(batch, channels, down * side, across * side)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    edges = left, width - across * side - left, top, height - down * side - top
    return (images + ball.to_surface(F.pad(tiled, edges))).clamp(0, 1)


def moved_energy(clean: Tensor, best: Tensor, words: Tensor, share: float, ball: Ball) -> Tensor:
    """Give a square of each image in L2 the energy of another one, and what the radius leaves."""
    height, width = clean.shape[2:]
    side = min(max(round(math.sqrt(share * height * width)), 3) // 2 * 2 + 1, height, width)
    delta = best - clean
    filled, emptied = (
        Squares.draw(places, clean.shape, side) for places in (words[:, :2], words[:, 4:6])
    )
    gets, loses = filled.inside(), emptied.inside()
    hills = filled.show(_both_ways(side, clean), words[:, 3] & 1)
    hills = torch.where(_signs(words[:, 2], clean), hills, -hills)  # [B, C, H, W]
    grown = torch.where(gets, hills + delta / (TINY + _energy(delta, gets).sqrt()), 0)
    left = (ball.eps**2 - _energy(delta).sum(1, keepdim=True)).clamp_min(0) / clean.shape[1]
    energy = left + _energy(delta, gets | loses)
    grown = grown / (TINY + _energy(grown).sqrt()) * energy.sqrt()
    moved = torch.where(gets, grown, torch.where(loses, 0, delta))
    return (clean + ball.to_surface(moved)).clamp(0, 1)


STARTS = {"linf": stripes, "l2": tiles}
"""Where a search begins: of clean images [B, C, H, W]."""

PROPOSALS = {"linf": recoloured, "l2": moved_energy}
"""What it tries next: of clean and best images, the words of a query [B, WORDS], the share of the
pixels that lie in a square, and the ball."""


def _ends(images: Tensor, up: Tensor, ball: Ball) -> Tensor:
    """Return images + eps where up and images - eps elsewhere, as far as images go."""
    return (images + ball.eps * (2 * up.to(images.dtype) - 1)).clamp(0, 1)


def _signs(words: Tensor, images: Tensor) -> Tensor:
    """Return a coin per image and channel, bool [B, C, 1, 1], from one word an image."""
    channels = torch.arange(images.shape[1], device=words.device)
    return (words[:, None] >> channels & 1).bool()[..., None, None]


def _energy(delta: Tensor, where: Tensor | None = None) -> Tensor:
    """Return the sum of squares of each channel, [B, C, 1, 1], of the pixels in `where`."""
    squares = delta**2 if where is None else torch.where(where, delta**2, 0)
    return squares.sum((2, 3), keepdim=True)


def _both_ways(side: int, images: Tensor) -> Tensor:
    """Return the pattern of two hills and the same turned, [2, side, side], like images."""
    upper, lower = _hill(side // 2, side), _hill(side - side // 2, side)
    hills = torch.cat([upper, -lower])
    hills = hills / hills.norm()
    both: Tensor = torch.stack([hills, hills.T]).to(images.device, images.dtype)
    return both


def _hill(height: int, width: int) -> Tensor:
    """Return a hill, float64 [height, width] of length 1.

    It is the sum of rings: at distance d of the middle, in rows or columns, sum_(k > d) 1 / k^2.
    """
    row, column = ((torch.arange(n) - n // 2).abs() for n in (height, width))
    distance = torch.maximum(row[:, None], column)
    rings = torch.arange(1, max(height, width) // 2 + 2, dtype=torch.float64) ** -2
    hill = rings.flip(0).cumsum(0).flip(0)[distance]
    unit: Tensor = hill / torch.linalg.vector_norm(hill)
    return unit

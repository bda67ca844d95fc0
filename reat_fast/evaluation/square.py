"""Square Attack in the L-infinity ball: random search over squares, with logits and no gradient.

Every pixel stays at an end of its range, so an image is two ends and a pattern of choices. Source:
Andriushchenko et al., ECCV 2020 (arXiv 1912.00049), algorithms 1 and 2, with the schedule of square
sizes that AutoAttack uses, unscaled by the number of queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reat_fast.evaluation.attacks import margin
from reat_fast.evaluation.victim import PerImage, Victim
from reat_fast.kernels import philox

LARGEST_SHARE = 0.8  # p of the first queries: share of the pixels in a square
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which p is halved."""

WORDS = 4  # random words per query: row, column, sign per channel, one unused
FIRST_EPOCH = 1000  # of the random counters: those of Auto-PGD, one a run, lie below
QUERIES_AT_ONCE = 100  # queries whose random words are drawn together


@dataclass
class _Search(PerImage):
    rows: Tensor
    samples: Tensor
    labels: Tensor
    low: Tensor
    high: Tensor
    best: Tensor
    margin: Tensor
    words: Tensor  # [B, queries at once, 4], random


@torch.no_grad()
def square(
    victim: Victim,
    images: Tensor,
    labels: Tensor,
    samples: Tensor,
    *,
    eps: float,
    seed: int = 0,
    queries: int = 5000,
) -> Tensor:
    """Try random squares until the model is fooled; return what was found.

    images [B, C, H, W] in [0, 1]; labels int64 [B]; samples int64 [B] names each image for the
    random numbers. Returns the fooling images, and the clean image where there is none.
    """
    found = images.clone()
    search = _stripes(images, labels, samples, eps, seed)
    _query(victim, search, search.best, found)
    for query in range(queries):
        if not len(search.rows):
            break
        turn = query % QUERIES_AT_ONCE
        if turn == 0:
            search.words = _draw(search.samples, seed, query // QUERIES_AT_ONCE)
        words = search.words[:, turn]
        inside = _squares(words, images.shape, query)
        up = words[:, 2, None] >> torch.arange(images.shape[1], device=words.device) & 1
        ends = torch.where(up.bool()[..., None, None], search.high, search.low)
        _query(victim, search, torch.where(inside, ends, search.best), found)
    return found


def _stripes(images: Tensor, labels: Tensor, samples: Tensor, eps: float, seed: int) -> _Search:
    """Begin at vertical stripes: one end of the range per image, channel and column."""
    batch, channels, _, width = images.shape
    words = philox.random_bits(seed, FIRST_EPOCH, samples, philox.EVALUATION, channels * width)
    up = philox.bernoulli(words, 0.5).view(batch, channels, 1, width)
    low, high = (images - eps).clamp(0, 1), (images + eps).clamp(0, 1)
    return _Search(
        rows=torch.arange(batch, device=images.device),
        samples=samples,
        labels=labels,
        low=low,
        high=high,
        best=torch.where(up, high, low),
        margin=images.new_full((batch,), torch.inf),
        words=_draw(samples, seed, 0),
    )


def _query(victim: Victim, search: _Search, tried: Tensor, found: Tensor) -> None:
    """Keep what lowers the margin; images that fool the model leave."""
    margins = margin(victim(tried), search.labels)
    fooled = victim.confirmed(margins <= 0, tried, search.labels)
    better = margins < search.margin
    search.best = torch.where(better.view(-1, 1, 1, 1), tried, search.best)
    search.margin = torch.where(better, margins, search.margin)
    if fooled.any():
        found[search.rows[fooled]] = tried[fooled]
        search.keep(~fooled)


def _draw(samples: Tensor, seed: int, turn: int) -> Tensor:
    count = QUERIES_AT_ONCE * WORDS
    words = philox.random_bits(seed, FIRST_EPOCH + 1 + turn, samples, philox.EVALUATION, count)
    return words.view(-1, QUERIES_AT_ONCE, WORDS)


def _squares(words: Tensor, shape: torch.Size, query: int) -> Tensor:
    """Place one square per image; returns bool [B, 1, H, W]."""
    height, width = shape[2:]
    share = LARGEST_SHARE / 2 ** sum(query > last for last in HALVINGS)
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    top, left = (
        philox.integers(words[:, k, None], length - side + 1)
        for k, length in enumerate((height, width))
    )
    row = torch.arange(height, device=words.device) - top  # [B, H], from the top of the square
    column = torch.arange(width, device=words.device) - left
    inside = ((row >= 0) & (row < side))[:, :, None] & ((column >= 0) & (column < side))[:, None, :]
    return inside[:, None]

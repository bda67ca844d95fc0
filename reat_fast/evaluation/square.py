"""Square Attack: random search over squares, with logits and no gradient.

What is tried in which norm is in square_moves. Source: Andriushchenko et al., ECCV 2020 (arXiv
1912.00049), algorithm 1, with the schedule of square sizes that AutoAttack uses, unscaled by the
number of queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reat_fast.attack import Norm
from reat_fast.evaluation.attacks import margin
from reat_fast.evaluation.ball import Ball
from reat_fast.evaluation.square_moves import PROPOSALS, STARTS, WORDS
from reat_fast.evaluation.victim import PerImage, Victim
from reat_fast.kernels import philox

LARGEST_SHARE = 0.8  # p of the first queries: share of the pixels in a square
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries after which p is halved."""

FIRST_EPOCH = 1000  # of the random counters: those of Auto-PGD, one a run, lie below
QUERIES_AT_ONCE = 100  # queries whose random words are drawn together


@dataclass(frozen=True)
class Reached:
    """Where a search stands between two queries; nothing of it changes after."""

    queries: int  # that are done
    rows: Tensor  # int64 [B], which of the images are still searched
    best: Tensor  # [B, C, H, W]
    margin: Tensor  # [B]

    def on(self, device: torch.device) -> Reached:
        """Return the same on another device."""
        moved = (tensor.to(device) for tensor in (self.rows, self.best, self.margin))
        return Reached(self.queries, *moved)


@dataclass
class _Search(PerImage):
    rows: Tensor
    samples: Tensor
    labels: Tensor
    clean: Tensor
    best: Tensor
    margin: Tensor
    words: Tensor  # [B, queries at once, WORDS], random


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
    norm: Norm = "linf",
    begun: Reached | None = None,
    report: Callable[[Reached], object] = lambda reached: None,
) -> Tensor:
    """Try random squares until the model is fooled; return what was found.

    images [B, C, H, W] in [0, 1]; labels int64 [B]; samples int64 [B] names each image for the
    random numbers. eps: a length in the norm. report: is told after each query where the search is.
    begun: what it was told, to go on from with the images, labels and samples of its rows.
    Returns the fooling images, and the clean image where there is none.
    """
    ball = Ball(norm, eps)
    found = images.clone()
    search = _begin(images, labels, samples, ball, seed, begun)
    if begun is None:
        _query(victim, search, search.best, found)
    first = 0 if begun is None else begun.queries
    for query in range(first, queries):
        if not len(search.rows):
            break
        turn = query % QUERIES_AT_ONCE
        if turn == 0 or query == first:
            search.words = _draw(search.samples, ball, seed, query // QUERIES_AT_ONCE)
        words = search.words[:, turn]
        tried = PROPOSALS[norm](search.clean, search.best, words, share_of(query), ball)
        _query(victim, search, tried, found)
        report(Reached(query + 1, search.rows, search.best, search.margin))
    return found


def share_of(query: int) -> float:
    """Return the share of the pixels that lie in a square of this query."""
    return LARGEST_SHARE * 0.5 ** sum(query > last for last in HALVINGS)


def _begin(
    images: Tensor, labels: Tensor, samples: Tensor, ball: Ball, seed: int, begun: Reached | None
) -> _Search:
    def words(count: int) -> Tensor:
        return philox.random_bits(seed, FIRST_EPOCH, samples, philox.EVALUATION, count)

    return _Search(
        rows=torch.arange(len(images), device=images.device),
        samples=samples,
        labels=labels,
        clean=images,
        best=STARTS[ball.norm](images, words, ball) if begun is None else begun.best,
        margin=images.new_full((len(images),), torch.inf) if begun is None else begun.margin,
        words=samples[:, None],  # drawn before the first query
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


def _draw(samples: Tensor, ball: Ball, seed: int, turn: int) -> Tensor:
    count = WORDS[ball.norm]
    words = philox.random_bits(
        seed, FIRST_EPOCH + 1 + turn, samples, philox.EVALUATION, QUERIES_AT_ONCE * count
    )
    return words.view(-1, QUERIES_AT_ONCE, count)

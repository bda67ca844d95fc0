"""FAB-T: walk along the decision boundary towards the image, for the fooling image nearest to it.

Source: Croce and Hein, ICML 2020 (arXiv 1907.02044), algorithm 1, aimed at one class as in
AutoAttack (arXiv 2003.01690). The search has no radius: it is over for an image when what
fools the model lies within eps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from reat_fast.attack import Norm
from reat_fast.evaluation.ball import Ball
from reat_fast.evaluation.victim import PerImage, Victim

OVERSHOOT = 1.05  # eta
LARGEST_BIAS = 0.1  # alpha_max: pull towards the clean image
BACKWARD = 0.9  # beta
MOST_NEWTON_STEPS = 50  # three to five are usual


@dataclass
class _Search(PerImage):
    rows: Tensor
    labels: Tensor
    targets: Tensor
    clean: Tensor
    adv: Tensor


def fab(
    victim: Victim,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    eps: float,
    steps: int = 100,
    norm: Norm = "linf",
) -> Tensor:
    """Walk from each image to its boundary with the target class; return what fools within eps.

    images [B, C, H, W] in [0, 1]; labels, targets int64 [B]. eps: a length in the norm. Returns
    the fooling images, and the clean image where there is none.
    """
    ball = Ball(norm, eps)
    found = images.clone()
    rows = torch.arange(len(images), device=images.device)
    search = _Search(rows, labels, targets, images, images)
    for _ in range(steps):
        if not len(search.rows):
            break
        _step_over_boundary(victim, search, ball)
        crossed = victim(search.adv).argmax(1) != search.labels
        near = ball.length(search.adv - search.clean) <= eps
        fooled = victim.confirmed(crossed & near, search.adv, search.labels)
        found[search.rows[fooled]] = search.adv[fooled]
        back = search.clean + BACKWARD * (search.adv - search.clean)
        search.adv = torch.where(crossed.view(-1, 1, 1, 1), back, search.adv)
        if fooled.any():
            search.keep(~fooled)
    return found


def _step_over_boundary(victim: Victim, search: _Search, ball: Ball) -> None:
    """Project onto the linearised boundary from where we are and from the clean image, and mix."""

    def lead(logits: Tensor) -> Tensor:
        own, target = (logits.gather(1, k[:, None]) for k in (search.labels, search.targets))
        return (target - own).squeeze(1)

    _, distance, normal = victim.gradient(search.adv, lead)
    offset = (normal * search.adv).flatten(1).sum(1) - distance
    here = hyperplane_step(search.adv, normal, offset, ball.norm)
    home = hyperplane_step(search.clean, normal, offset, ball.norm)
    here_size, home_size = (
        ball.length(move).clamp_min(1e-8).view(-1, 1, 1, 1) for move in (here, home)
    )
    bias = (here_size / (here_size + home_size)).clamp_max(LARGEST_BIAS)
    search.adv = (
        (1 - bias) * (search.adv + OVERSHOOT * here) + bias * (search.clean + OVERSHOOT * home)
    ).clamp(0, 1)


def hyperplane_step(points: Tensor, normal: Tensor, offset: Tensor, norm: Norm = "linf") -> Tensor:
    """Return the smallest step, in the norm, from points in [0, 1] to <normal, z> = offset.

    points, normal [B, ...], offset [B]. The step stays in the box; where the hyperplane misses the
    box it leads to the corner nearest to it. Unless its bound stops it each coordinate moves by the
    same size in L-infinity, and in L2 by the size times its share of the normal: the size solves a
    concave equation, piecewise linear, by Newton's method from 0.
    """
    flat, weights = points.flatten(1), normal.flatten(1)
    gap = offset - (weights * flat).sum(1)
    up = (weights > 0) == (gap > 0)[:, None]
    room = torch.where(up, 1 - flat, flat)
    weight = weights.abs()
    pace = _shares(weight) if norm == "l2" else (weight > 0).to(weight.dtype)
    slopes = weight * pace
    size = torch.zeros_like(gap)
    farthest = torch.full_like(gap, torch.finfo(gap.dtype).max)
    for _ in range(MOST_NEWTON_STEPS):
        move = torch.minimum(room, size[:, None] * pace)
        slope = (slopes * (move < room)).sum(1)
        missing = (gap.abs() - (weight * move).sum(1)).clamp_min(0)
        # No slope left: the box ends before the hyperplane.
        further = torch.where(slope > 0, size + missing / slope, farthest).minimum(farthest)
        grows = further > size * (1 + 1e-6)
        if not grows.any():
            break
        # A row that is done stays as it is, however many turns others take.
        size = torch.where(grows, further, size)
    step = torch.minimum(room, size[:, None] * pace)
    return torch.where(up, step, -step).view_as(points)


def _shares(weight: Tensor) -> Tensor:
    """Divide each row by its largest number, whose square would be lost where all are small."""
    largest = weight.amax(1, keepdim=True)
    return weight / torch.where(largest > 0, largest, 1)

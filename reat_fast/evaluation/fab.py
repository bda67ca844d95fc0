"""FAB-T: walk along the decision boundary towards the image, for the fooling image nearest to it.

Source: Croce and Hein, ICML 2020 (arXiv 1907.02044), algorithm 1 in L-infinity, aimed at one class
as in AutoAttack (arXiv 2003.01690). The search has no radius: it is over for an image when what
fools the model lies within eps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
) -> Tensor:
    """Walk from each image to its boundary with the target class; return what fools within eps.

    images [B, C, H, W] in [0, 1]; labels, targets int64 [B]. Returns the fooling images, and the
    clean image where there is none.
    """
    found = images.clone()
    rows = torch.arange(len(images), device=images.device)
    search = _Search(rows, labels, targets, images, images)
    for _ in range(steps):
        if not len(search.rows):
            break
        _step_over_boundary(victim, search)
        crossed = victim(search.adv).argmax(1) != search.labels
        near = (search.adv - search.clean).abs().flatten(1).amax(1) <= eps
        fooled = victim.confirmed(crossed & near, search.adv, search.labels)
        found[search.rows[fooled]] = search.adv[fooled]
        back = search.clean + BACKWARD * (search.adv - search.clean)
        search.adv = torch.where(crossed.view(-1, 1, 1, 1), back, search.adv)
        if fooled.any():
            search.keep(~fooled)
    return found


def _step_over_boundary(victim: Victim, search: _Search) -> None:
    """Project onto the linearised boundary from where we are and from the clean image, and mix."""

    def lead(logits: Tensor) -> Tensor:
        own, target = (logits.gather(1, k[:, None]) for k in (search.labels, search.targets))
        return (target - own).squeeze(1)

    _, distance, normal = victim.gradient(search.adv, lead)
    offset = (normal * search.adv).flatten(1).sum(1) - distance
    here = hyperplane_step(search.adv, normal, offset)
    home = hyperplane_step(search.clean, normal, offset)
    here_size, home_size = (
        move.abs().flatten(1).amax(1).clamp_min(1e-8).view(-1, 1, 1, 1) for move in (here, home)
    )
    bias = (here_size / (here_size + home_size)).clamp_max(LARGEST_BIAS)
    search.adv = (
        (1 - bias) * (search.adv + OVERSHOOT * here) + bias * (search.clean + OVERSHOOT * home)
    ).clamp(0, 1)


def hyperplane_step(points: Tensor, normal: Tensor, offset: Tensor) -> Tensor:
    """Return the smallest step, in L-infinity, from points in [0, 1] to <normal, z> = offset.

    points, normal [B, ...], offset [B]. The step stays in the box; where the hyperplane misses the
    box it leads to the corner nearest to it. Each coordinate moves by the same size unless its
    bound stops it: the size solves a concave equation, piecewise linear, by Newton's method from 0.
    """
    flat, weights = points.flatten(1), normal.flatten(1)
    gap = offset - (weights * flat).sum(1)
    up = (weights > 0) == (gap > 0)[:, None]
    room = torch.where(up, 1 - flat, flat)
    weight = weights.abs()
    size = torch.zeros_like(gap)
    for _ in range(MOST_NEWTON_STEPS):
        free = weight * (room > size[:, None])
        slope = free.sum(1)
        reached = (weight * torch.minimum(room, size[:, None])).sum(1)
        further = size + (gap.abs() - reached).clamp_min(0) / slope
        # No slope left: the box ends before the hyperplane.
        further = torch.where(slope > 0, further, torch.ones_like(size))
        if not (further > size * (1 + 1e-6)).any():
            break
        size = torch.maximum(size, further)
    step = torch.minimum(room, size[:, None]) * (weight > 0)
    return torch.where(up, step, -step).view_as(points)

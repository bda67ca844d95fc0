"""Auto-PGD: gradient ascent in a ball that sets its own step size, image by image.

Nothing is shared between images, so one that is fooled leaves the batch and the others do not
notice. Source: Croce and Hein, ICML 2020 (arXiv 2003.01690), algorithm 1 and equation 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast.attack import Norm
from reat_fast.evaluation.ball import Ball
from reat_fast.evaluation.victim import PerImage, Victim

MOMENTUM = 0.75  # alpha of the paper: share of the gradient step, the rest is the last move
RISING_SHARE = 0.75  # rho: a step size stays while this share of its steps raises the loss

Objective = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each row [B]; targets are not used."""
    return F.cross_entropy(logits, labels, reduction="none")


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio of each row [B]; logits [B, K], K >= 4.

    Scaling or shifting the logits leaves it as it is, so it cannot be hidden by large logits.
    """
    own, target = (logits.gather(1, k[:, None]).squeeze(1) for k in (labels, targets))
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return -(own - target) / (first - (third + fourth) / 2 + 1e-12)


@dataclass
class _Search(PerImage):
    rows: Tensor
    labels: Tensor
    targets: Tensor
    clean: Tensor
    adv: Tensor
    before: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    step_size: Tensor
    rises: Tensor
    was_halved: Tensor
    checked_loss: Tensor


def apgd(
    victim: Victim,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    noise: Tensor,
    objective: Objective,
    *,
    eps: float,
    steps: int = 100,
    norm: Norm = "linf",
) -> Tensor:
    """Search the eps-ball round each image for one that fools the model; return what was found.

    images [B, C, H, W] in [0, 1]; labels, targets int64 [B]; noise like images, of at most eps, is
    the start. eps: a length in the norm. Returns the fooling images, and the clean image where
    there is none.
    """
    ball = Ball(norm, eps)
    found = images.clone()
    adv = (images + noise).clamp(0, 1)
    search, logits = _begin(victim, images, labels, targets, adv, objective, eps)
    _leave_if_fooled(victim, search, found, logits)
    checkpoints = _checkpoints(steps)
    checked = 0
    for step in range(steps):
        if not len(search.rows):
            break
        _move(search, ball, MOMENTUM if step else 1.0)
        logits, loss, search.gradient = victim.gradient(
            search.adv, lambda z: objective(z, search.labels, search.targets)
        )
        search.rises += loss > search.loss
        search.loss = loss
        _leave_if_fooled(victim, search, found, logits)
        _note_best(search)
        if step + 1 in checkpoints:
            _halve_steps(search, step + 1 - checked)
            checked = step + 1
    if len(search.rows):
        # Low precision may call right what the model itself gets wrong.
        fooled = victim.fooled(search.best, search.labels)
        found[search.rows[fooled]] = search.best[fooled]
    return found


def _begin(
    victim: Victim,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    adv: Tensor,
    objective: Objective,
    eps: float,
) -> tuple[_Search, Tensor]:
    logits, loss, gradient = victim.gradient(adv, lambda z: objective(z, labels, targets))
    search = _Search(
        rows=torch.arange(len(images), device=images.device),
        labels=labels,
        targets=targets,
        clean=images,
        adv=adv,
        before=adv,
        gradient=gradient,
        loss=loss,
        best=adv,
        best_gradient=gradient,
        best_loss=loss,
        step_size=torch.full_like(loss, 2 * eps),
        rises=torch.zeros_like(labels),
        was_halved=torch.ones_like(labels, dtype=torch.bool),
        checked_loss=loss,
    )
    return search, logits


def _move(search: _Search, ball: Ball, momentum: float) -> None:
    step = search.step_size.view(-1, 1, 1, 1) * ball.uphill(search.gradient)
    moved = ball.project(search.adv + step, search.clean)
    last_move = search.adv - search.before
    moved = search.adv + momentum * (moved - search.adv) + (1 - momentum) * last_move
    search.before, search.adv = search.adv, ball.project(moved, search.clean)


def _leave_if_fooled(victim: Victim, search: _Search, found: Tensor, logits: Tensor) -> None:
    fooled = victim.confirmed(logits.argmax(1) != search.labels, search.adv, search.labels)
    if fooled.any():
        found[search.rows[fooled]] = search.adv[fooled]
        search.keep(~fooled)


def _note_best(search: _Search) -> None:
    better = search.loss > search.best_loss
    pixels = better.view(-1, 1, 1, 1)
    search.best = torch.where(pixels, search.adv, search.best)
    search.best_gradient = torch.where(pixels, search.gradient, search.best_gradient)
    search.best_loss = torch.where(better, search.loss, search.best_loss)


def _halve_steps(search: _Search, steps: int) -> None:
    """Halve the steps that do not pay, and go on from the best image; the paper's conditions."""
    seldom_rose = search.rises <= RISING_SHARE * steps
    stuck = ~search.was_halved & (search.checked_loss >= search.best_loss)
    halved = seldom_rose | stuck
    pixels = halved.view(-1, 1, 1, 1)
    search.step_size = torch.where(halved, search.step_size / 2, search.step_size)
    search.adv = torch.where(pixels, search.best, search.adv)
    search.gradient = torch.where(pixels, search.best_gradient, search.gradient)
    search.loss = torch.where(halved, search.best_loss, search.loss)
    search.rises = torch.zeros_like(search.rises)
    search.was_halved, search.checked_loss = halved, search.best_loss


def _checkpoints(steps: int) -> set[int]:
    """Return when step sizes are checked: after steps 22, 41, 57, 70, 80, 87, 93, 99 of 100."""
    at, gap, least, shrink = 0, *(max(int(s * steps), 1) for s in (0.22, 0.06, 0.03))
    checkpoints = set()
    while at + gap <= steps:
        at += gap
        checkpoints.add(at)
        gap = max(gap - shrink, least)
    return checkpoints

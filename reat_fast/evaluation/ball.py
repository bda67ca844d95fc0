"""The ball that a search may not leave, in L-infinity or L2, cut off where images end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reat_fast.attack import Norm, of_length
from reat_fast.kernels.l2 import into_ball, unit


@dataclass(frozen=True)
class Ball:
    """All images in [0, 1] within eps of a clean one; eps in L2 is a length over a whole image."""

    norm: Norm
    eps: float

    def length(self, moves: Tensor) -> Tensor:
        """Return how far each of the moves [B, ...] leads, [B]."""
        rows = moves.flatten(1)
        if self.norm == "linf":
            return rows.abs().amax(1)
        lengths: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return lengths

    def uphill(self, gradient: Tensor) -> Tensor:
        """Return the move of length 1 along which the loss rises the fastest, like gradient.

        Elements that are NaN or infinite count as none, in L-infinity NaN alone.
        """
        if self.norm == "linf":
            return gradient.sign()
        return unit(gradient.nan_to_num(0.0, 0.0, 0.0))

    def project(self, images: Tensor, clean: Tensor) -> Tensor:
        """Return the images [B, ...], each brought back into the ball round its clean one."""
        if self.norm == "linf":
            near = torch.minimum(torch.maximum(images, clean - self.eps), clean + self.eps)
        else:
            near = into_ball(images, clean, self.eps)
        return near.clamp(0, 1)

    def to_surface(self, moves: Tensor) -> Tensor:
        """Stretch each of the moves [B, ...] to length eps; 0 stays 0."""
        if self.norm == "l2":
            return of_length(moves, self.eps)
        lengths = self.length(moves).view(-1, *(1,) * (moves.ndim - 1))
        return self.eps * (moves / torch.where(lengths > 0, lengths, 1))

    def holds(self, images: Tensor, clean: Tensor) -> bool:
        """Say whether all images [B, ...] lie in the ball, but for rounding; syncs.

        In L-infinity a pixel is rounded once, two units in the last place of 1; in L2 all are, in
        the same direction at worst, and the length is.
        """
        pixels = 1 if self.norm == "linf" else math.sqrt(max(clean[0].numel(), 1))
        farthest = float(self.length(images - clean).max())
        return farthest <= self.eps * (1 + 2.0**-20 * (pixels > 1)) + pixels * 2.0**-22

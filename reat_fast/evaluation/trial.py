"""One model, one set of images, one attack after the other: which images does it get right?"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reat_fast.data import ImageSet
from reat_fast.engine.precision import Precision, full_precision
from reat_fast.evaluation import batches
from reat_fast.evaluation.attacks import AUTOATTACKS, PACKAGED, Attack
from reat_fast.evaluation.autoattack import AutoAttack
from reat_fast.evaluation.captured import Ascents
from reat_fast.evaluation.packaged import package_autoattack
from reat_fast.evaluation.search_state import SearchState
from reat_fast.evaluation.victim import Victim
from reat_fast.kernels.prepare import prepare


@dataclass(frozen=True)
class Settings:
    """What the figures of attacks depend on, beside the model and the images; see measure."""

    eps: float
    seed: int
    restarts: int
    precision: Precision
    batch_size: int
    """Changes no figure, but how much is computed at once."""


@dataclass(frozen=True)
class Watch:
    """Who follows an evaluation, and where its searches keep what they found; see measure."""

    state: SearchState | None
    progress: Callable[[int], object] | None
    bar: tqdm[Any] | None
    say: Callable[[str], object]


@dataclass(frozen=True)
class Images:
    """Clean images and random starts at rows of a share of a set, which may decode on demand."""

    image_set: ImageSet
    victim: Victim
    seed: int
    eps: float
    numbers: Tensor | None = None
    """Which images of the set the share holds, int64 [N] on the CPU; None: all. The random numbers
    of an image belong to its number in the set, whoever looks at it."""

    def __call__(self, rows: Tensor, restart: int = 0) -> tuple[Tensor, Tensor]:
        rows = rows if self.numbers is None else self.numbers[rows]
        pixels = np.ascontiguousarray(self.image_set.images[rows.numpy()])
        device, dtype = self.victim.device, self.victim.dtype
        pair = prepare(
            torch.from_numpy(pixels).to(device),
            rows.to(device),
            self.seed,
            restart,
            self.eps,
            gather=False,
            padding=0,
            flip=False,
        )
        clean, start = (t.to(dtype) for t in pair)
        return clean, start


@dataclass(frozen=True)
class Trial:
    """One model on one set of images, attacked in one way after the other."""

    victim: Victim
    images: Images
    labels: Tensor  # int64 [N] on the CPU, of the share
    settings: Settings
    watch: Watch
    ascents: Ascents

    def run(self, attack: Attack) -> tuple[Tensor, dict[str, Tensor]]:
        """Return which images the model gets right, bool [N], and Tally.after of AutoAttack."""
        if attack.name not in AUTOATTACKS:
            return self._ascent(attack), {}
        packaged = attack.name in PACKAGED
        right, details = (self._package(attack), {}) if packaged else self._autoattack(attack)
        self._done(len(self.labels))
        return right, details

    def _done(self, images: int) -> None:
        if self.watch.progress is not None:
            self.watch.progress(images)

    def _ascent(self, attack: Attack) -> Tensor:
        right = torch.ones(len(self.labels), dtype=torch.bool)
        restarts = self.settings.restarts if attack.random_start else 1
        steps = attack.steps * restarts * math.ceil(len(right) / self.settings.batch_size)
        for restart in range(restarts):
            standing = right.nonzero().squeeze(1)  # what fell to an earlier start need not again
            if len(standing):
                left = len(standing) * attack.passes * (restarts - restart)
                right[standing] = self._survive(attack, restart, standing, steps, left).cpu()
        return right

    def _survive(
        self, attack: Attack, restart: int, standing: Tensor, steps: int, left: int
    ) -> Tensor:
        """Attack the images at `standing` once; return which the model still gets right, bool [B].

        The verdicts stay on the device. What waits for it is the copy of the next images, so that
        progress is told of what is done. steps: of batches, by the whole attack. left: passes of
        images to the end of the attack, if none falls.
        """
        labels = self.labels[standing].to(self.victim.device)
        # No more at once than of all images: that is what a graph was captured for.
        most = batches.even(len(self.labels), self.settings.batch_size)
        size = batches.even(len(standing), most)
        right = []
        for rows, own in zip(standing.split(size), labels.split(size), strict=True):
            self.victim.expect(attack.name, left)
            clean, start = self.images(rows, restart)
            adv = self.ascents.perturb(attack, clean, start, own, self.settings.eps, steps)
            right.append(~self.victim.fooled(adv, own))
            left -= len(rows) * attack.passes
            self._done(len(rows))
        return torch.cat(right)

    def _autoattack(self, attack: Attack) -> tuple[Tensor, dict[str, Tensor]]:
        self.ascents.close()  # freeing one graph takes the workspace of others on its stream along
        search = AutoAttack(
            self.victim,
            lambda rows: self.images(rows)[0],
            self.labels,
            eps=attack.radius(self.settings.eps),
            seed=self.settings.seed,
            batch_size=self.settings.batch_size,
            state=self.watch.state,
            numbers=self.images.numbers,
            norm=attack.norm,
        )
        standing = search.run()
        return standing.robust, {stage: torch.tensor(n) for stage, n in standing.after.items()}

    def _package(self, attack: Attack) -> Tensor:
        self.victim.expect(attack.name, 0)
        clean, _ = self.images(torch.arange(len(self.labels)))
        labels = self.labels.to(clean.device)
        with full_precision():
            return package_autoattack(
                self.victim.model,
                clean,
                labels,
                eps=attack.radius(self.settings.eps),
                seed=self.settings.seed,
                batch_size=self.settings.batch_size,
                norm=attack.norm,
            )

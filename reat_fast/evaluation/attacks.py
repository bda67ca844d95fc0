"""The attacks that the field reports, by name: clean, FGSM, PGD-N, CW-N, LSA-N and AutoAttack.

All but AutoAttack are signed gradient ascent with different losses, judged at their last step;
AutoAttack, which the names aa and aa-package stand for, has a module of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from reat_fast.attack import AttackLoss, ascend, cross_entropy
from reat_fast.evaluation.victim import Victim
from reat_fast.methods.work import FORWARD, WITH_GRADIENT

NAMES = "clean, fgsm, pgdN, cwN, lsaN (N steps: pgd20, pgd100, cw20, lsa20), aa or aa-package"
AUTOATTACKS = ("aa", "aa-package")
CW_CONFIDENCE = 50.0
LSA_SCALE = 10.0


@dataclass(frozen=True)
class Attack:
    """One attack of an evaluation: steps of signed gradient ascent on a loss, or AutoAttack."""

    name: str
    steps: int
    step_size: float
    random_start: bool
    loss: str = "pgd"

    @classmethod
    def from_name(cls, name: str, eps: float, step_size: float) -> Attack:
        """Read an attack by name; eps and step_size in the units of images in [0, 1].

        clean: no attack. fgsm: one step of eps from the clean image (Goodfellow et al., 2015).
        pgdN: N steps of step_size on the cross-entropy from a random start (Madry et al., 2018).
        cwN: the same on the margin of Carlini and Wagner (2017). lsaN: the same on scaled logits
        (Hitaj et al., 2021). aa, aa-package: AutoAttack, ours and that of pyautoattack.
        Errors: ValueError listing the names.
        """
        match = re.fullmatch(r"(pgd|cw|lsa)([1-9]\d{0,3})", name)
        if match:
            return cls(name, int(match[2]), step_size, random_start=True, loss=match[1])
        if name == "fgsm":
            return cls(name, 1, eps, random_start=False)
        if name in ("clean", *AUTOATTACKS):
            return cls(name, 0, 0.0, random_start=False)
        raise ValueError(f"unknown attack {name!r}; attacks are {NAMES}")

    @property
    def passes(self) -> int:
        """Forward passes that an image costs, the verdict included; AutoAttack counts its own."""
        return self.steps * WITH_GRADIENT + FORWARD

    def begin(self, clean: Tensor, start: Tensor) -> Tensor:
        """Return where the first step begins: at `start`, clean plus noise, or at the images."""
        return start if self.random_start else clean

    def perturb(
        self, victim: Victim, clean: Tensor, start: Tensor, labels: Tensor, eps: float
    ) -> Tensor:
        """Return adversarial images for clean ones [B, C, H, W]; start is clean plus noise."""
        return ascend(
            victim,
            self.begin(clean, start).clone(),  # ascend writes into it
            clean,
            labels,
            eps=eps,
            step_size=self.step_size,
            steps=self.steps,
            loss=LOSSES[self.loss],
        )


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Return z_y - max_{k != y} z_k for each row of logits [B, K]: negative where it is wrong."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
    return (own - others).squeeze(1)


def cw_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum -max(margin + 50, 0) over the batch: the CW loss that the field runs inside PGD.

    Source: Carlini and Wagner, S&P 2017, eq. f_6 with the confidence 50 of Madry's code, which the
    evaluation of AT-BSL (CVPR 2024) has too. RobustLT takes 0, which stops once fooled.
    """
    return -(margin(logits, labels) + CW_CONFIDENCE).clamp_min(0).sum()


def lsa_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum the cross-entropy of ten times the logits: what a rescaled loss hides shows again.

    Source: Hitaj et al., arXiv 2103.01914 (logit scaling attack); 10 as in AT-BSL's evaluation.
    """
    return cross_entropy(LSA_SCALE * logits, labels)


LOSSES: dict[str, AttackLoss] = {"pgd": cross_entropy, "cw": cw_loss, "lsa": lsa_loss}

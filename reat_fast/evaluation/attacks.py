"""The attacks that the field reports: clean, FGSM, PGD-N, CW-N, LSA-N, PGD-N in L2 and AutoAttack.

All but AutoAttack are projected gradient ascent with different losses, judged at their last step;
AutoAttack, which the names in AUTOATTACKS stand for, has a module of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reat_fast.attack import AttackLoss, Norm, ascend_, cross_entropy, of_length
from reat_fast.cli.radius import fraction_text
from reat_fast.evaluation.victim import Victim
from reat_fast.methods.work import FORWARD, WITH_GRADIENT

NAMES = (
    "clean, fgsm, pgdN, cwN, lsaN, l2pgdN (N steps: pgd20, pgd100, cw20, lsa20, l2pgd20), aa, "
    "l2aa, aa-package or l2aa-package"
)
PACKAGED = ("aa-package", "l2aa-package")
AUTOATTACKS = ("aa", "l2aa", *PACKAGED)
CW_CONFIDENCE = 50.0
LSA_SCALE = 10.0
LINF_STEP = 1 / 4
"""Step of pgdN, cwN and lsaN over the radius, however a network was trained: 2/255 of 8/255."""
L2_EPS = 128 / 255
"""The L2 radius that the field tests CIFAR-sized images with."""
L2_STEP = 15 / 128
"""Step of l2pgdN over its radius: 15/255 of 128/255 (Rice et al., ICML 2020)."""


@dataclass(frozen=True)
class Attack:
    """One attack of an evaluation: steps of gradient ascent on a loss, or AutoAttack."""

    name: str
    steps: int
    step_size: float
    random_start: bool
    loss: str = "pgd"
    l2_eps: float | None = None
    """Radius of an attack in L2, whose step_size is an L2 length too; None: it is in L-infinity."""
    eps: float | None = None
    """L-infinity radius that the steps were made for; None: any, as of those in L2 and of clean."""

    @classmethod
    def from_name(
        cls, name: str, eps: float, step_size: float | None = None, l2_eps: float = L2_EPS
    ) -> Attack:
        """Read an attack by name; eps and step_size in the units of images in [0, 1].

        step_size: None is LINF_STEP of eps.
        clean: no attack. fgsm: one step of eps from the clean image (Goodfellow et al., 2015).
        pgdN: N steps of step_size on the cross-entropy from a random start (Madry et al., 2018).
        cwN: the same on the margin of Carlini and Wagner (2017). lsaN: the same on scaled logits
        (Hitaj et al., 2021). l2pgdN: pgdN along the gradient in the L2 ball of l2_eps, for models
        trained in L-infinity a threat they have not met. aa, aa-package: AutoAttack, ours and that
        of pyautoattack; l2aa, l2aa-package: the same in the L2 ball of l2_eps.
        Errors: ValueError listing the names.
        """
        if match := re.fullmatch(r"l2pgd([1-9]\d{0,3})", name):
            return cls(name, int(match[1]), L2_STEP * l2_eps, random_start=True, l2_eps=l2_eps)
        match = re.fullmatch(r"(pgd|cw|lsa)([1-9]\d{0,3})", name)
        if match:
            step = LINF_STEP * eps if step_size is None else step_size
            return cls(name, int(match[2]), step, random_start=True, loss=match[1], eps=eps)
        if name == "fgsm":
            return cls(name, 1, eps, random_start=False, eps=eps)
        if name == "clean":
            return cls(name, 0, 0.0, random_start=False)
        if name in AUTOATTACKS:
            if name.startswith("l2"):
                return cls(name, 0, 0.0, random_start=False, l2_eps=l2_eps)
            return cls(name, 0, 0.0, random_start=False, eps=eps)
        raise ValueError(f"--attacks: unknown attack {name!r}; attacks are {NAMES}")

    @property
    def passes(self) -> int:
        """Forward passes that an image costs, the verdict included; AutoAttack counts its own."""
        return self.steps * WITH_GRADIENT + FORWARD

    @property
    def norm(self) -> Norm:
        """The norm of the ball that is searched."""
        return "linf" if self.l2_eps is None else "l2"

    def radius(self, eps: float) -> float:
        """Return the radius of that ball, where L-infinity has eps."""
        return eps if self.l2_eps is None else self.l2_eps

    def begin(self, clean: Tensor, start: Tensor) -> Tensor:
        """Return where the first step begins: at `start`, clean plus noise, or at the images.

        In L2 the noise is stretched to the radius: of a ball in so many dimensions nearly all is
        there.
        """
        if not self.random_start:
            return clean
        return start if self.l2_eps is None else clean + of_length(start - clean, self.l2_eps)

    def perturb(
        self, victim: Victim, clean: Tensor, start: Tensor, labels: Tensor, eps: float
    ) -> Tensor:
        """Return adversarial images for clean ones [B, C, H, W]; start is clean plus noise.

        eps: the L-infinity radius.
        """
        return ascend_(
            victim,
            self.begin(clean, start).clone(),
            clean,
            labels,
            eps=self.radius(eps),
            step_size=self.step_size,
            steps=self.steps,
            loss=LOSSES[self.loss],
            norm=self.norm,
        )


def threat_text(evaluation: Mapping[str, Any], attack: str | None = None) -> str:
    """Say in which ball an attack of an evaluation searched; None: all of them, with their steps.

    evaluation: what evaluation.json holds.
    """
    l2_eps = evaluation.get("l2_eps", L2_EPS)
    if attack is not None and attack.startswith("l2"):
        return f"L2 eps {fraction_text(l2_eps)}"
    if attack is not None:
        return f"eps {fraction_text(evaluation['eps'])}"
    eps, step = (fraction_text(evaluation[name]) for name in ("eps", "step_size"))
    linf, l2 = f"L-infinity eps {eps}, step {step}", f"L2 eps {fraction_text(l2_eps)}"
    names = [name for name in evaluation["attacks"] if name != "clean"]
    in_l2 = [name.startswith("l2") for name in names]
    if any(name.startswith("l2pgd") for name in names):
        l2 += f", step {fraction_text(L2_STEP * l2_eps)}"
    if all(in_l2):
        return l2 if names else linf
    return f"{linf}; {l2}" if any(in_l2) else linf


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

"""What the attack of a training step maximises, where it starts and how far it goes.

PGD and the one-step attacks differ in the numbers of a plan only, so attack.ascend_ is all of them.
Free training differs in kind: it trains on the images that it attacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from reat_fast.attack import AttackLoss, SummedClassLoss, cross_entropy, uniform_noise
from reat_fast.config import Config
from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.prepare import Noise
from reat_fast.kernels.triton_support import in_loss_precision
from reat_fast.methods.cosine_head import CosineHead
from reat_fast.networks.architectures import Network
from reat_fast.objective import ClassStatistics

AttackLossName = Literal["ce", "bsl", "rbl", "rbl_offsets", "kl", "cosine"]
AttackName = Literal["pgd", "fgsm-rs", "n-fgsm"]

NORMAL_START = 0.001
"""Standard deviation of the normal start of TRADES and all that were written after it."""

EARLY_ATTACK: AttackName = "n-fgsm"
"""Makes the examples of epochs before --attack-from."""


@dataclass(frozen=True)
class AttackPlan:
    """The numbers of a sign-gradient attack on images in [0, 1].

    noise, noise_scale: what kernels.prepare adds to the clean images, its half-width or standard
    deviation; clamp_start: whether that is brought into [0, 1] before the first gradient; radius:
    of the ball round the clean images; step_size, steps: see attack.ascend_.
    """

    noise: Noise
    noise_scale: float
    clamp_start: bool
    radius: float
    step_size: float
    steps: int

    def draw_start(self, images: Tensor, scale: float | Tensor | None = None) -> Tensor:
        """Return images plus noise from the default generator, for steps without a loader.

        scale: a noise_scale for each image [B], or one for all; None is the plan's own.
        """
        scale = self.noise_scale if scale is None else scale
        if self.noise == "none":
            return images.clone()
        if self.noise == "uniform":
            return self.settle_(images + uniform_noise(images, scale))
        per_image = scale.view(-1, 1, 1, 1) if isinstance(scale, Tensor) else scale
        return self.settle_(images + per_image * torch.randn_like(images))

    def settle_(self, start: Tensor) -> Tensor:
        """Bring a start, noise added, to where the attack begins; in place, may not sync."""
        return start.clamp_(0.0, 1.0) if self.clamp_start else start


def resolve_attack_loss(config: Config) -> AttackLossName:
    """Say what the attack maximises when the configuration leaves it open.

    REAT multiplies each sample's loss by a positive weight and PGD takes the sign of each sample's
    own gradient, so with BatchNorm in eval mode, where samples do not meet, RBL changes nothing.
    """
    if config.attack_loss != "auto":
        return config.attack_loss
    return "ce" if config.attack_batchnorm == "eval" else "rbl"


def plan_attack(
    attack: AttackName, *, eps: float, step_size: float, steps: int, start: Noise = "uniform"
) -> AttackPlan:
    """Return the plan of an attack; step_size, steps and start are for pgd, others have their own.

    pgd: steps of step_size from U(-eps, eps), 0.001 N(0, 1) or the images themselves.
    fgsm-rs: one step of 1.25 eps from U(-eps, eps). Source: train_fgsm.py of Fast AT (ICLR 2020).
    n-fgsm: one step of eps from U(-2 eps, 2 eps), not brought back round the clean images.
    Source: train.py of N-FGSM (NeurIPS 2022).
    """
    match attack:
        case "pgd":
            scale = {"uniform": eps, "normal": NORMAL_START, "none": 0.0}[start]
            return AttackPlan(start, scale, False, eps, step_size, steps)
        case "fgsm-rs":
            return AttackPlan("uniform", eps, True, eps, 1.25 * eps, 1)
        case "n-fgsm":
            # No pixel is farther away than 3 eps: this radius never binds.
            return AttackPlan("uniform", 2 * eps, True, 4 * eps, eps, 1)
    raise ValueError(f"--attack {attack}: is unknown; give pgd, fgsm-rs or n-fgsm")


def choose_attack_loss(
    name: AttackLossName,
    network: Network,
    statistics: ClassStatistics,
    clean_logits: Callable[[], Tensor],
) -> AttackLoss:
    """Return what one attack maximises: a sum over samples of logits [B, K] and labels [B].

    To be called once an attack. clean_logits: computes those of the attacked network on the clean
    images; called for kl only.
    ce: cross-entropy. bsl: of logits + log n_c. rbl: weighted by class as in REAT. rbl_offsets: the
    same weights as logit offsets. kl: KL(clean || adv) of TRADES. cosine: cross-entropy of RoBal's
    plain cosines, whose scale and compensation its attack does without.
    Errors: ValueError for an unknown name, and for cosine on a network without the cosine head.
    """
    match name:
        case "ce":
            return cross_entropy
        case "bsl":
            return SummedClassLoss(offsets=statistics.log_counts)
        case "rbl":
            # The official loss divides by the batch's sum of weights: one positive number for all
            # samples, which no sign can see, and which would only shrink the gradient.
            return SummedClassLoss(weights=statistics.weights)
        case "rbl_offsets":
            # Rarely predicted classes become likelier in the attacked softmax, so the attack pushes
            # images towards them: what re-balancing is for, in a form that reaches the sign.
            return SummedClassLoss(offsets=statistics.weights.log())
        case "kl":
            with torch.no_grad():
                return partial(_divergence, clean=in_loss_precision(clean_logits()).softmax(1))
        case "cosine":
            if not isinstance(network.fc, CosineHead):
                raise ValueError("--attack-loss cosine: needs --head cosine")
            return partial(_cosine, head=network.fc)
    raise ValueError(f"--attack-loss {name}: is unknown")


class FreePerturbation:
    """Attack with the gradient that training computes anyway: "free" adversarial training.

    A step trains on the same images `replays` times and moves the perturbation after each by the
    sign of the gradient that the backward left on them; the next batch starts from there. shape:
    images of a whole batch [B, C, H, W]; shorter batches use the first rows.
    Source: train_free.py of Fast AT (ICLR 2020), after Shafahi et al., NeurIPS 2019.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        eps: float,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._eps = eps
        zeros = torch.zeros(shape, device=device, dtype=dtype)
        self._perturbation = zeros.to(memory_format=torch.channels_last)

    def attacked(self, images: Tensor) -> Tensor:
        """Return the images [B, C, H, W] to train on: a leaf, so that backward fills its grad."""
        return (images + self._perturbation[: len(images)]).detach().requires_grad_()

    @torch.no_grad()
    def update_(self, attacked: Tensor, images: Tensor, nonfinite: Tensor | None = None) -> None:
        """Take a step of eps from `attacked` and keep where it ends; may not sync."""
        assert attacked.grad is not None, "the backward comes before the update"
        adv = attacked.detach().clone()
        linf_step_(adv, attacked.grad, images, self._eps, self._eps, nonfinite=nonfinite)
        self._perturbation[: len(images)] = adv - images

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        return {"free_perturbation": self._perturbation}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state, into the same memory; zeros where none had been made yet."""
        saved = state.get("free_perturbation")
        self._perturbation.copy_(torch.zeros_like(self._perturbation) if saved is None else saved)


def _divergence(logits: Tensor, labels: Tensor, *, clean: Tensor) -> Tensor:
    # KL(clean || adv) without the entropy of the clean softmax, which has no gradient.
    return -(clean * in_loss_precision(logits).log_softmax(1)).sum()


def _cosine(logits: Tensor, labels: Tensor, *, head: CosineHead) -> Tensor:
    return class_loss(head.cosines(logits), labels, reduction="sum")

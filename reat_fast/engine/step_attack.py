"""The attack of a training step: which network it sees, what it maximises, how far it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from reat_fast.attack import ascend_
from reat_fast.config import Config
from reat_fast.engine.precision import low_dtype, resolve_precision
from reat_fast.kernels import boxes
from reat_fast.methods.attacks import (
    EARLY_ATTACK,
    choose_attack_loss,
    plan_attack,
    resolve_attack_loss,
)
from reat_fast.methods.radii import ClassRadii
from reat_fast.networks.architectures import Network
from reat_fast.networks.borrowed import with_batch_statistics
from reat_fast.networks.compiling import require_compiler
from reat_fast.networks.frozen import Form, FrozenNetwork, fastest_form
from reat_fast.networks.likeness import keeps
from reat_fast.networks.tracing import is_foreign
from reat_fast.objective import ClassStatistics

LOOKED_AT = 16
"""Images on which a network of others is compared with its copy."""


def resolve_form(config: Config, device: torch.device) -> Form:
    """Say how the attacked network computes when the configuration leaves it open."""
    if config.attack_form != "auto":
        return config.attack_form
    return fastest_form(low_dtype(resolve_precision(config, device)) or torch.float32, device)


def _require_own_kernels(dtype: torch.dtype | None, device: torch.device) -> None:
    """Raise ValueError where no convolution would be computed by a kernel of ours."""
    reason = boxes.why_not(device)
    if reason is not None:
        raise ValueError(f"--attack-form triton: {reason}; leave it out")
    if dtype is None:
        raise ValueError("--attack-form triton: computes in bfloat16; give --precision bf16")


class StepAttack:
    """Make the adversarial examples that a training step trains on.

    model, statistics, counts, config: those of the step. autocast: makes the context in which the
    network itself computes. plan: the numbers of the attack in the running epoch. network: the
    frozen copy that is attacked, None where BatchNorm takes the statistics of the attacked batch,
    and in free training, which makes no examples here. A network of others is compared with its
    copy in the first call: where rewriting it changed it, it is attacked as it is.
    """

    def __init__(
        self,
        model: Network,
        statistics: ClassStatistics,
        counts: Sequence[int],
        config: Config,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        weight = next(model.parameters())
        device = weight.device
        self._model, self._statistics, self._autocast = model, statistics, autocast
        self._loss = resolve_attack_loss(config)
        self.network: FrozenNetwork | None = None
        if config.attack_batchnorm == "eval" and config.attack != "free":
            form = resolve_form(config, device)
            low = low_dtype(resolve_precision(config, device))
            if form == "compiled":
                require_compiler("--attack-form compiled", device)
            if form == "triton":
                _require_own_kernels(low, device)
            if form == "cudnn" and device.type != "cuda":
                raise ValueError("--attack-form cudnn: needs a CUDA device; leave it out")
            if form == "cpu" and low is not None:
                raise ValueError(
                    "--attack-form cpu: computes in float32, not bfloat16; give --attack-form auto"
                )
            self.network = FrozenNetwork(model, low, form)
        self._unchecked = self.network is not None and is_foreign(model)
        self._radii: ClassRadii | None = None
        if config.radius == "class":
            warmup = config.radius_warmup * config.epochs
            self._radii = ClassRadii(counts, config.radius_alpha, warmup, device, weight.dtype)
        self._config = config
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Take up what the host has to know of an epoch, counted from 0."""
        config = self._config
        name = config.attack if epoch >= config.attack_from else EARLY_ATTACK
        self._common_start = name == "pgd"
        self.plan = plan_attack(
            "pgd" if name == "free" else name,
            eps=config.eps,
            step_size=config.step_size,
            steps=config.steps,
            # Free training makes no examples here, and needs no noise for them.
            start="none" if name == "free" else config.start,
        )

    def refresh(self) -> None:
        """Take up the weights that the model has now; may not sync."""
        if self.network is not None:
            self.network.refresh()

    def noise_scale(self, labels: Tensor, epoch: Tensor) -> float | Tensor:
        """Return the scale of the random start, for each image [B] where radii differ; no sync.

        RobustLT's PGD starts from the common radius whatever the class; a one-step attack is made
        of multiples of its radius, the start among them.
        """
        if self._radii is None or self._common_start:
            return self.plan.noise_scale
        return self.plan.noise_scale * self._radii.factors(labels, epoch)

    def examples(
        self,
        images: Tensor,
        labels: Tensor,
        adv_start: Tensor,
        *,
        parts: Iterable[slice],
        epoch: Tensor,
        nonfinite: Tensor,
    ) -> Tensor:
        """Return adversarial examples of images [B, C, H, W], found from adv_start.

        May not sync, but for the first call on a network of others.

        parts: rows that are attacked one after another. epoch: int64, on which radii depend.
        nonfinite: int64, to which bad gradient elements are added.
        """
        if self._unchecked and len(images):
            self._check(images[:LOOKED_AT])
        victim = self.network or self._on_batch_statistics
        eps: float | Tensor = self.plan.radius
        step_size: float | Tensor = self.plan.step_size
        if self._radii is not None:
            factors = self._radii.factors(labels, epoch)
            eps, step_size = eps * factors, step_size * factors
        found = []
        for rows in parts:
            clean = images[rows]
            clean_logits = partial(victim, clean)
            adv = ascend_(
                victim,
                adv_start[rows],
                clean,
                labels[rows],
                eps=eps[rows] if isinstance(eps, Tensor) else eps,
                step_size=step_size[rows] if isinstance(step_size, Tensor) else step_size,
                steps=self.plan.steps,
                loss=choose_attack_loss(self._loss, self._model, self._statistics, clean_logits),
                nonfinite=nonfinite,
            )
            found.append(adv)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _check(self, images: Tensor) -> None:
        assert self.network is not None
        dtype, rewritten = self.network.images_dtype, self.network
        low = dtype != images.dtype
        if low:
            form = fastest_form(images.dtype, images.device)
            rewritten = FrozenNetwork(self._model, form=form)
        if not keeps(self._model, rewritten, low, images):
            self.network = FrozenNetwork(self._model, dtype, rewritten=False)
        self._unchecked = False

    def _on_batch_statistics(self, images: Tensor) -> Tensor:
        with self._autocast():
            return with_batch_statistics(self._model)(images)

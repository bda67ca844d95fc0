"""The reference as a step of the training loop: what --no-fused trains with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reat_fast import reference
from reat_fast.cli.command import flag
from reat_fast.config import Config
from reat_fast.engine.distributed import World
from reat_fast.networks.architectures import Network
from reat_fast.step import TrainStep

UNKNOWN = (
    *("tail_coefficient", "clip_norm", "label_smoothing", "ema", "accumulate", "objective"),
    *("attack", "attack_from", "start", "radius", "head", "awp", "policy"),
)
"""Fields that the reference takes at their default only."""
ATTACK = {"attack_batchnorm": ("eval",), "attack_loss": ("auto", "ce", "rbl")}
"""Those in which its attack may differ, since these give the same examples."""


class ReferenceStep(TrainStep):
    """Take steps of the plain reference, with the face of TrainStep."""

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        counts: Sequence[int],
        config: Config,
        world: World | None = None,
    ) -> None:
        only = {field: (getattr(Config(), field),) for field in UNKNOWN} | ATTACK
        misfits = [field for field, known in only.items() if getattr(config, field) not in known]
        if misfits:
            flags = " ".join(f"{flag(field)} {only[field][0]}" for field in misfits)
            raise ValueError(
                f"--no-fused: the reference is that of REAT and of balanced softmax; give {flags}"
            )
        if world is not None and world.size > 1:
            raise ValueError("--no-fused: the reference runs in one process; leave out torchrun")
        super().__init__(model, optimizer, counts, config, world)

    def _step(
        self, images: Tensor, labels: Tensor, adv_start: Tensor, total: int
    ) -> dict[str, Tensor]:
        config, statistics = self.config, self.statistics
        outcome = reference.train_step(
            self.model,
            self.optimizer,
            images,
            labels,
            counts=statistics.counts.tolist(),
            ae_counts=statistics.ae_counts.tolist(),
            start=adv_start - images,
            eps=config.eps,
            step_size=config.step_size,
            steps=config.steps,
            tail=config.tail,
        )
        predictions = outcome["logits"].argmax(1)
        statistics.next_ae_counts += predictions.bincount(minlength=len(statistics.counts))
        self.update.share_and_record(outcome, labels)
        return outcome

"""One training step: batch -> attack -> objective -> backward -> update -> statistics.

One body for every way of running it. Nothing in it asks the host for a value or has a shape that
depends on data: counts, weights, learning rate, epoch and sums are tensors on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from reat_fast.attack import (
    AttackLoss,
    ascend,
    cross_entropy,
    uniform_noise,
    with_batch_statistics,
)
from reat_fast.average import WeightAverage
from reat_fast.config import Config
from reat_fast.frozen import FrozenNetwork
from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.prepare import prepare
from reat_fast.kernels.tail_penalty import tail_penalty
from reat_fast.loaders import Batch
from reat_fast.networks import Network
from reat_fast.objective import AttackLossName, ClassStatistics
from reat_fast.precision import resolve_precision

TOTALS = ("loss", "bsl", "tail", "correct", "samples", "steps")


def make_optimizer(model: Network, config: Config) -> torch.optim.SGD:
    """Make SGD whose learning rate is a tensor on the device, with its momentum in place.

    Both are what a captured step needs: a float would be baked into the graph, and a momentum
    buffer made in the first step would be reset by every replay. Zero momentum equals none yet.
    """
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(
        parameters,
        lr=torch.tensor(config.lr, device=parameters[0].device),
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=True,
    )
    if config.momentum:
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def resolve_attack_loss(config: Config) -> AttackLossName:
    """Say what the attack maximises when the configuration leaves it open.

    REAT multiplies each sample's loss by a positive weight and PGD takes the sign of each sample's
    own gradient, so with BatchNorm in eval mode, where samples do not meet, RBL changes nothing.
    """
    if config.attack_loss != "auto":
        return config.attack_loss
    return "ce" if config.attack_batchnorm == "eval" else "rbl"


class TrainStep:
    """Take fused steps of REAT on a model.

    model: a network of reat_fast.models on its device; optimizer: any that updates its parameters
    (make_optimizer for one that can be captured); counts: training images per class.
    """

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        counts: Sequence[int],
        config: Config,
    ) -> None:
        weight = next(model.parameters())
        device = weight.device
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.statistics = ClassStatistics(counts, device, weight.dtype)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self._low = torch.bfloat16 if resolve_precision(config, device) == "bf16" else None
        eval_mode = config.attack_batchnorm == "eval"
        self._frozen = FrozenNetwork(model, self._low) if eval_mode else None
        self._attack_loss = self._make_attack_loss(resolve_attack_loss(config))

    def train_on(self, batch: Batch) -> dict[str, Tensor]:
        """Augment a batch of a loader, draw its random start and take a step on it."""
        config = self.config
        images, adv_start = prepare(
            batch.images,
            batch.indices,
            config.seed,
            self.epoch,
            config.eps,
            gather=batch.gather,
            padding=4 if config.augment else 0,
            flip=config.augment,
        )
        return self._step(images, batch.labels, adv_start)

    def __call__(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Take one step on images [B, C, H, W] in [0, 1] with labels int64 [B]; may not sync.

        start: noise like images, or None for U(-eps, eps).
        Returns images_adv [B, C, H, W], logits [B, K] before the update, loss, bsl and tail
        (scalars), all detached. Leaves the model in train mode.
        """
        noise = uniform_noise(images, self.config.eps) if start is None else start
        return self._step(images, labels, images + noise)

    def end_epoch(self) -> dict[str, float]:
        """Renew the class statistics and return the epoch's means; the one sync of an epoch.

        Returns loss, bsl, tail (means over samples), adv_accuracy (in percent, of the examples
        trained on, before each update) and nonfinite (gradient elements of the attack).
        """
        self.statistics.end_epoch()
        means = self.running_means()
        means["nonfinite"] = int(self.nonfinite)
        self.totals.zero_()
        self.nonfinite.zero_()
        self.epoch += 1
        return means

    def evaluated_network(self) -> Network:
        """Return what is evaluated and saved: the averaged network where there is one."""
        return self.model if self.average is None else self.average.network()

    def running_means(self) -> dict[str, float]:
        """Return the means of the epoch so far; syncs."""
        sums = dict(zip(TOTALS, self.totals.tolist(), strict=True))
        samples = max(sums["samples"], 1.0)
        means = {name: sums[name] / samples for name in ("loss", "bsl", "tail")}
        return {**means, "adv_accuracy": 100 * sums["correct"] / samples}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beside the weights and the optimiser."""
        own = {"epoch": self.epoch, "totals": self.totals, "nonfinite": self.nonfinite}
        average = {} if self.average is None else self.average.state_dict()
        return {**self.statistics.state_dict(), **average, **own}

    def state_tensors(self) -> list[Tensor]:
        """Return every tensor that a step changes and the next one reads, the model's included."""
        momentum = [
            value
            for slots in self.optimizer.state.values()
            for value in slots.values()
            if isinstance(value, Tensor)
        ]
        model = [tensor.detach() for tensor in self.model.state_dict(keep_vars=True).values()]
        return [*model, *momentum, *self.state_dict().values(), self.statistics.weights]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state, into the same memory."""
        self.statistics.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state)
        for name in ("epoch", "totals", "nonfinite"):
            getattr(self, name).copy_(state[name])

    def _step(self, images: Tensor, labels: Tensor, adv_start: Tensor) -> dict[str, Tensor]:
        self.model.train()
        images_adv = self._attack(images, labels, adv_start)
        self.optimizer.zero_grad(set_to_none=False)
        with self._autocast():
            features, logits = self.model.forward_features_logits(images_adv)
        bsl = class_loss(
            logits,
            labels,
            offsets=self.statistics.log_counts,
            label_smoothing=self.config.label_smoothing,
            histogram=self.statistics.next_ae_counts,
        )
        tail = self._tail(features, labels)
        loss = bsl + tail
        loss.backward()
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_()
        outcome = {"images_adv": images_adv, "logits": logits, "loss": loss, "bsl": bsl}
        outcome = {name: value.detach() for name, value in {**outcome, "tail": tail}.items()}
        self._record(outcome, labels)
        return outcome

    def _attack(self, images: Tensor, labels: Tensor, adv_start: Tensor) -> Tensor:
        config = self.config
        if self._frozen is not None:
            self._frozen.refresh()
        return ascend(
            self._frozen or self._on_batch_statistics,
            adv_start,
            images,
            labels,
            eps=config.eps,
            step_size=config.step_size,
            steps=config.steps,
            loss=self._attack_loss,
            nonfinite=self.nonfinite,
        )

    def _on_batch_statistics(self, images: Tensor) -> Tensor:
        with self._autocast():
            return with_batch_statistics(self.model)(images)

    def _autocast(self) -> torch.autocast:
        # No cache: casts kept from outside a capture would be stale in its replays.
        device = self.totals.device.type
        enabled = self._low is not None
        return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _make_attack_loss(self, name: AttackLossName) -> AttackLoss:
        weights = self.statistics.weights
        match name:
            case "ce":
                return cross_entropy
            case "rbl":
                return partial(_rbl_sum, weights)
            case "rbl_offsets":
                return partial(_rbl_offsets, weights)

    def _tail(self, features: Tensor, labels: Tensor) -> Tensor:
        config = self.config
        if config.tail == "none":
            return features.new_zeros(())
        return tail_penalty(
            features,
            labels,
            self.statistics.counts,
            form=config.tail,
            coefficient=config.tail_coefficient,
        )

    def _record(self, outcome: dict[str, Tensor], labels: Tensor) -> None:
        samples = labels.new_full((), labels.numel())
        correct = (outcome["logits"].argmax(1) == labels).sum()
        sums = [outcome[name] * samples for name in ("loss", "bsl", "tail")]
        ones = torch.ones_like(samples)
        self.totals += torch.stack([t.double() for t in (*sums, correct, samples, ones)])


def _rbl_sum(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    # The official loss divides by the batch's sum of weights: one positive number for all samples,
    # which no sign can see, and which would only shrink the gradient.
    return class_loss(logits, labels, weights=weights, reduction="sum")


def _rbl_offsets(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    # Offsets make rarely predicted classes likelier in the attacked softmax, so the attack pushes
    # images towards them: what re-balancing is for, in a form that reaches the sign.
    return class_loss(logits, labels, offsets=weights.log(), reduction="sum")

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
from reat_fast.distributed import SharedGradients, World, split, synchronise_batchnorm_
from reat_fast.frozen import FrozenNetwork
from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.prepare import prepare
from reat_fast.kernels.tail_penalty import tail_penalty
from reat_fast.loaders import Batch
from reat_fast.networks import Network
from reat_fast.objective import AttackLossName, ClassStatistics
from reat_fast.precision import resolve_precision

TOTALS = ("loss", "bsl", "tail", "correct", "samples", "steps")
COUNTERS = ("epoch", "totals", "nonfinite", "bad_step")


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
    (make_optimizer for one that can be captured); counts: training images per class. world: the
    processes that train together; each takes its share of every batch.
    """

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        counts: Sequence[int],
        config: Config,
        world: World | None = None,
    ) -> None:
        weight = next(model.parameters())
        device = weight.device
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.world = world or World()
        self.world.take_from_main_(model.state_dict().values())
        self.statistics = ClassStatistics(counts, device, weight.dtype)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.totals = torch.zeros(len(TOTALS), dtype=torch.float64, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._low = torch.bfloat16 if resolve_precision(config, device) == "bf16" else None
        eval_mode = config.attack_batchnorm == "eval"
        self._frozen = FrozenNetwork(model, self._low) if eval_mode else None
        self._attack_loss = self._make_attack_loss(resolve_attack_loss(config))
        self._shared: SharedGradients | None = None
        self._histogram = self.statistics.next_ae_counts
        if self.world.size > 1:
            if config.sync_batchnorm:
                synchronise_batchnorm_(model, self.world)
            self._histogram = torch.zeros_like(self._histogram)
            summed = 4 + len(counts)
            self._shared = SharedGradients(list(model.parameters()), summed, self.world)

    def train_on(self, batch: Batch, total: int | None = None) -> dict[str, Tensor]:
        """Augment a batch of a loader, draw its random start and take a step on it.

        total: images of the whole batch where this process has a share of it.
        """
        config = self.config
        total = len(batch.labels) if total is None else total
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
        return self._step(images, batch.labels, adv_start, total)

    def __call__(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Take one step on images [B, C, H, W] in [0, 1] with labels int64 [B]; may not sync.

        start: noise like images, or None for U(-eps, eps).
        Returns images_adv [B, C, H, W], logits [B, K] before the update, loss, bsl and tail
        (scalars), all detached. Leaves the model in train mode.
        """
        noise = uniform_noise(images, self.config.eps) if start is None else start
        return self._step(images, labels, images + noise, len(labels))

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
        self.bad_step.fill_(-1)
        self.epoch += 1
        return means

    @property
    def unfolded(self) -> list[str]:
        """Names of the BatchNorms that the attack does not fold into a convolution."""
        return [] if self._frozen is None else self._frozen.unfolded

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
        own = {name: getattr(self, name) for name in COUNTERS}
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
        for name in COUNTERS:
            getattr(self, name).copy_(state[name])

    def _step(
        self, images: Tensor, labels: Tensor, adv_start: Tensor, total: int
    ) -> dict[str, Tensor]:
        """Take one step on this process's share of a batch of `total` images."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=False)
        if self._frozen is not None:
            self._frozen.refresh()
        parts, first = [], 0
        for sizes in self._part_sizes(total):
            rows = slice(first, first := first + sizes[self.world.rank])
            part = self._part(images[rows], labels[rows], adv_start[rows], sizes, total)
            parts.append(part)
        outcome = _joined(parts)
        self._share_and_record(outcome, labels)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_()
        return outcome

    def _part_sizes(self, total: int) -> list[list[int]]:
        """Return the rows of each part of a batch, computed one after another, per process."""
        per_process = [split(n, self.config.accumulate) for n in split(total, self.world.size)]
        return [list(sizes) for sizes in zip(*per_process, strict=True) if any(sizes)]

    def _part(
        self, images: Tensor, labels: Tensor, adv_start: Tensor, sizes: list[int], total: int
    ) -> dict[str, Tensor]:
        """Attack rows of a batch and add their part of the gradient; values are parts of means."""
        images_adv = self._attack(images, labels, adv_start)
        with self._autocast():
            features, logits = self.model.forward_features_logits(images_adv)
        bsl = class_loss(
            logits,
            labels,
            offsets=self.statistics.log_counts,
            label_smoothing=self.config.label_smoothing,
            histogram=self._histogram,
            reduction="sum",
        )
        bsl = bsl / total
        # The penalty looks at pairs, so each process computes that of all rows; see World.gather.
        features, labels = (self.world.gather(rows, sizes) for rows in (features, labels))
        tail = self._tail(features, labels) * (len(labels) / total)
        (bsl + tail).backward()
        outcome = {"images_adv": images_adv, "logits": logits, "bsl": bsl, "tail": tail}
        return {name: value.detach() for name, value in outcome.items()}

    def _attack(self, images: Tensor, labels: Tensor, adv_start: Tensor) -> Tensor:
        config = self.config
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

    def _share_and_record(self, outcome: dict[str, Tensor], labels: Tensor) -> None:
        """Sum gradients and statistics over the processes; complete the outcome, keep the sums."""
        correct = (outcome["logits"].argmax(1) == labels).sum()
        # Each process knows its part of bsl, and all of them the whole tail.
        own = (outcome["bsl"], outcome["tail"] / self.world.size, correct, _count(labels))
        sums = torch.stack([value.double() for value in own])
        if self._shared is not None:
            sums = self._shared.sum_(torch.cat([sums, self._histogram.double()])).double()
            self.statistics.next_ae_counts += sums[len(own) :].long()
            self._histogram.zero_()
            outcome["bsl"], outcome["tail"] = sums[:2].to(outcome["bsl"].dtype)
        outcome["loss"] = outcome["bsl"] + outcome["tail"]
        bsl, tail, correct, samples = sums[: len(own)]
        first_bad = ~outcome["loss"].isfinite() & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first_bad, self.totals[-1].long(), self.bad_step))
        means = torch.stack([bsl + tail, bsl, tail])
        counts = torch.stack([correct, samples, torch.ones_like(samples)])
        self.totals += torch.cat([means * samples, counts])


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Put the outcomes of the parts of a batch together: rows in order, values summed."""
    if len(parts) == 1:
        return parts[0]
    rows = {name: torch.cat([part[name] for part in parts]) for name in ("images_adv", "logits")}
    return rows | {name: torch.stack([p[name] for p in parts]).sum(0) for name in ("bsl", "tail")}


def _count(labels: Tensor) -> Tensor:
    return labels.new_full((), labels.numel())


def _rbl_sum(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    # The official loss divides by the batch's sum of weights: one positive number for all samples,
    # which no sign can see, and which would only shrink the gradient.
    return class_loss(logits, labels, weights=weights, reduction="sum")


def _rbl_offsets(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    # Offsets make rarely predicted classes likelier in the attacked softmax, so the attack pushes
    # images towards them: what re-balancing is for, in a form that reaches the sign.
    return class_loss(logits, labels, offsets=weights.log(), reduction="sum")

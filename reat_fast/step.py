"""One training step: batch -> attack -> objective -> backward -> update -> statistics.

One body for every method and every way of running it. Nothing in it asks the host for a value or
has a shape that depends on data: counts, weights, learning rate, epoch and sums are tensors on the
device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from reat_fast.attack import ascend, with_batch_statistics
from reat_fast.augment import apply_policy
from reat_fast.average import WeightAverage
from reat_fast.config import Config
from reat_fast.distributed import SharedGradients, World, split, synchronise_batchnorm_
from reat_fast.frozen import Form, FrozenNetwork
from reat_fast.kernels.prepare import prepare
from reat_fast.loaders import Batch
from reat_fast.methods.attacks import (
    AttackLossName,
    FreePerturbation,
    choose_attack_loss,
    plan_attack,
)
from reat_fast.methods.objectives import Part, make_objective
from reat_fast.methods.radii import ClassRadii
from reat_fast.methods.weight_perturbation import WeightPerturbation, statistics_kept
from reat_fast.networks import Network
from reat_fast.objective import ClassStatistics
from reat_fast.precision import resolve_precision

COUNTERS = ("epoch", "totals", "nonfinite", "bad_step")
SUMS = ("correct", "samples", "steps")


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


def resolve_form(config: Config, device: torch.device) -> Form:
    """Say how the attacked network computes when the configuration leaves it open.

    On an H100, bfloat16, ResNet-18, whole captured step: eager 18.3 ms, compiled 15.5, cudnn 15.6,
    which starts without compiling (python -m bench.bench_step).
    """
    if config.attack_form != "auto":
        return config.attack_form
    low = resolve_precision(config, device) == "bf16"
    return "cudnn" if device.type == "cuda" and low else "eager"


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
        self.objective = make_objective(
            config.objective,
            model,
            self.statistics,
            tail=config.tail,
            tail_coefficient=config.tail_coefficient,
            label_smoothing=config.label_smoothing,
            beta=config.beta,
            margin=config.margin,
            margin_tau=config.margin_tau,
            prior_tau=config.prior_tau,
            second_stage=config.second_stage,
        )
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self._names = ("loss", *self.objective.terms, *SUMS)
        self.totals = torch.zeros(len(self._names), dtype=torch.float64, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._low = torch.bfloat16 if resolve_precision(config, device) == "bf16" else None
        self._free: FreePerturbation | None = None
        self._plan_attack(counts, weight)
        self._awp = WeightPerturbation(model, config.awp) if config.awp else None
        self._shared: SharedGradients | None = None
        self._histogram = self.statistics.next_ae_counts
        if self.world.size > 1:
            if config.sync_batchnorm:
                synchronise_batchnorm_(model, self.world)
            self._histogram = torch.zeros_like(self._histogram)
            summed = len(self.objective.terms) + 2 + len(counts)
            self._shared = SharedGradients(list(model.parameters()), summed, self.world)

    def _plan_attack(self, counts: Sequence[int], weight: Tensor) -> None:
        config, device, dtype = self.config, weight.device, weight.dtype
        eval_mode = config.attack_batchnorm == "eval"
        self._frozen = (
            FrozenNetwork(self.model, self._low, resolve_form(config, device))
            if eval_mode
            else None
        )
        self._attack_loss = resolve_attack_loss(config)
        self._radii: ClassRadii | None = None
        if config.radius == "class":
            warmup = config.radius_warmup * config.epochs
            self._radii = ClassRadii(counts, config.radius_alpha, warmup, device, dtype)
        name = "pgd" if config.attack == "free" else config.attack
        self.plan = plan_attack(
            name,
            eps=config.eps,
            step_size=config.step_size,
            steps=config.steps,
            start=config.start,
        )

    def train_on(self, batch: Batch, total: int | None = None) -> dict[str, Tensor]:
        """Augment a batch of a loader, draw its random start and take a step on it.

        total: images of the whole batch where this process has a share of it.
        """
        config = self.config
        total = len(batch.labels) if total is None else total
        images, gather = batch.images, batch.gather
        if config.policy != "none":
            images = apply_policy(
                images,
                batch.indices,
                config.seed,
                self.epoch,
                config.policy,
                magnitude=config.policy_magnitude,
                gather=gather,
            )
            gather = False
        images, adv_start = prepare(
            images,
            batch.indices,
            config.seed,
            self.epoch,
            self.plan.noise_scale,
            gather=gather,
            padding=4 if config.augment else 0,
            flip=config.augment,
            noise=self.plan.noise,
        )
        return self._step(images, batch.labels, self.plan.settle_(adv_start), total)

    def __call__(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Take one step on images [B, C, H, W] in [0, 1] with labels int64 [B]; may not sync.

        start: noise like images, or None for what the attack draws, U(-eps, eps) in REAT.
        Returns images_adv [B, C, H, W], logits [B, K] before the update, the loss and its terms
        (scalars; bsl and tail in REAT), all detached. Leaves the model in train mode.
        """
        begin = self.plan.draw_start(images) if start is None else images + start
        return self._step(images, labels, begin, len(labels))

    def allocate(self, images: Tensor) -> None:
        """Make the state whose shape is that of images [B, C, H, W], where there is one."""
        if self.config.attack == "free" and self._free is None:
            channels, height, width = images.shape[1:]
            shape = (self.config.batch_size, channels, height, width)
            self._free = FreePerturbation(shape, self.config.eps, images.device, images.dtype)

    def end_epoch(self) -> dict[str, float]:
        """Renew the class statistics and return the epoch's means; the one sync of an epoch.

        Returns the loss and its terms (means over samples), adv_accuracy (in percent, of the
        examples trained on, before each update) and nonfinite (gradient elements of the attack).
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
        sums = dict(zip(self._names, self.totals.tolist(), strict=True))
        samples = max(sums["samples"], 1.0)
        means = {name: sums[name] / samples for name in self._names[: -len(SUMS)]}
        return {**means, "adv_accuracy": 100 * sums["correct"] / samples}

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beside the weights and the optimiser."""
        own = {name: getattr(self, name) for name in COUNTERS}
        average = {} if self.average is None else self.average.state_dict()
        free = {} if self._free is None else self._free.state_dict()
        return {**self.statistics.state_dict(), **average, **free, **own}

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
        if "free_perturbation" in state:
            self.allocate(state["free_perturbation"].to(self.totals.device))
            assert self._free is not None
            self._free.load_state_dict(state)
        for name in COUNTERS:
            getattr(self, name).copy_(state[name])

    def _step(
        self, images: Tensor, labels: Tensor, adv_start: Tensor, total: int
    ) -> dict[str, Tensor]:
        """Take one step on this process's share of a batch of `total` images."""
        self.model.train()
        if self._frozen is not None:
            self._frozen.refresh()
        if self.config.attack == "free":
            outcome = self._free_updates(images, labels, total)
        else:
            images_adv = self._attack(images, labels, adv_start, total)
            outcome = self._update(images, images_adv, labels, total)
        if self.average is not None:
            self.average.update_()
        return outcome

    def _attack(self, images: Tensor, labels: Tensor, adv_start: Tensor, total: int) -> Tensor:
        victim, plan = self._frozen or self._on_batch_statistics, self.plan
        eps: float | Tensor = plan.radius
        step_size: float | Tensor = plan.step_size
        if self._radii is not None:
            factors = self._radii.factors(labels, self.epoch)
            eps, step_size = eps * factors, step_size * factors
        found = []
        for rows, _ in self._parts(total):
            clean = images[rows]
            loss = choose_attack_loss(
                self._attack_loss, self.model, self.statistics, partial(victim, clean)
            )
            adv = ascend(
                victim,
                adv_start[rows],
                clean,
                labels[rows],
                eps=eps[rows] if isinstance(eps, Tensor) else eps,
                step_size=step_size[rows] if isinstance(step_size, Tensor) else step_size,
                steps=plan.steps,
                loss=loss,
                nonfinite=self.nonfinite,
            )
            found.append(adv)
        return found[0] if len(found) == 1 else torch.cat(found)

    def _update(
        self, images: Tensor, images_adv: Tensor, labels: Tensor, total: int
    ) -> dict[str, Tensor]:
        """Update the weights by the gradient of the objective, where AWP asks at worse weights."""
        if self._awp is None:
            return self._descend(images, images_adv, labels, total)
        with statistics_kept(self.model):
            self._gradients(images, images_adv, labels, total, torch.zeros_like(self._histogram))
            if self._shared is not None:
                self._shared.sum_()
        with self._awp.perturbed():
            return self._descend(images, images_adv, labels, total)

    def _descend(
        self, images: Tensor, images_adv: Tensor, labels: Tensor, total: int
    ) -> dict[str, Tensor]:
        outcome = self._gradients(images, images_adv, labels, total, self._histogram)
        self._share_and_record(outcome, labels)
        if self.config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
        self.optimizer.step()
        return outcome | {"images_adv": images_adv.detach()}

    def _gradients(
        self, images: Tensor, images_adv: Tensor, labels: Tensor, total: int, histogram: Tensor
    ) -> dict[str, Tensor]:
        """Leave the gradient of the objective in grad; returns its terms and the logits."""
        self.optimizer.zero_grad(set_to_none=False)
        logits: list[Tensor] = []
        terms: list[dict[str, Tensor]] = []
        for rows, sizes in self._parts(total):
            part = Part(
                images[rows],
                images_adv[rows],
                labels[rows],
                total,
                self.epoch,
                histogram,
                partial(self.world.gather, sizes=sizes),
            )
            found, values = self.objective.compute(self._forward, part)
            torch.stack(list(values.values())).sum().backward()
            logits.append(found.detach())
            terms.append({name: value.detach() for name, value in values.items()})
        summed = {name: torch.stack([t[name] for t in terms]).sum(0) for name in terms[0]}
        return {"logits": logits[0] if len(logits) == 1 else torch.cat(logits), **summed}

    def _parts(self, total: int) -> Iterator[tuple[slice, list[int]]]:
        """Yield this process's rows of each part of a batch, and the rows every process has."""
        per_process = [split(n, self.config.accumulate) for n in split(total, self.world.size)]
        first = 0
        for sizes in zip(*per_process, strict=True):
            if any(sizes):
                rows = slice(first, first := first + sizes[self.world.rank])
                yield rows, list(sizes)

    def _free_updates(self, images: Tensor, labels: Tensor, total: int) -> dict[str, Tensor]:
        """Update `replays` times on one batch, each time moving the perturbation after it."""
        self.allocate(images)
        assert self._free is not None
        for _ in range(self.config.replays):
            attacked = self._free.attacked(images)
            outcome = self._update(images, attacked, labels, total)
            self._free.update_(attacked, images, self.nonfinite)
        return outcome

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self.model.forward_features_logits(images)

    def _on_batch_statistics(self, images: Tensor) -> Tensor:
        with self._autocast():
            return with_batch_statistics(self.model)(images)

    def _autocast(self) -> torch.autocast:
        # No cache: casts kept from outside a capture would be stale in its replays.
        device = self.totals.device.type
        enabled = self._low is not None
        return torch.autocast(device, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def _share_and_record(self, outcome: dict[str, Tensor], labels: Tensor) -> None:
        """Sum gradients and statistics over the processes; complete the outcome, keep the sums."""
        names, size = self.objective.terms, self.world.size
        correct = (outcome["logits"].argmax(1) == labels).sum()
        # Each process knows its part of most terms, and all of them the whole of the others.
        own = [outcome[name] / (size if name in self.objective.whole else 1) for name in names]
        own += [correct, labels.new_full((), labels.numel())]
        sums = torch.stack([value.double() for value in own])
        if self._shared is not None:
            sums = self._shared.sum_(torch.cat([sums, self._histogram.double()])).double()
            self.statistics.next_ae_counts += sums[len(own) :].long()
            self._histogram.zero_()
            outcome |= {n: t.to(outcome[n].dtype) for n, t in zip(names, sums, strict=False)}
        outcome["loss"] = torch.stack([outcome[name] for name in names]).sum()
        first_bad = ~outcome["loss"].isfinite() & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first_bad, self.totals[-1].long(), self.bad_step))
        terms, (correct, samples) = sums[: len(names)], sums[len(names) : len(own)]
        means = torch.cat([terms.sum()[None], terms]) * samples
        counts = torch.stack([correct, samples, torch.ones_like(samples)])
        self.totals += torch.cat([means, counts])

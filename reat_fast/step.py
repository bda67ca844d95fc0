"""One training step: batch -> attack -> objective -> backward -> update -> statistics.

One body for every method and every way of running it. Nothing in it asks the host for a value or
has a shape that depends on data: counts, weights, learning rate, epoch and sums are tensors on the
device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reat_fast.config import Config
from reat_fast.engine import step_checks
from reat_fast.engine.augment import apply_policy
from reat_fast.engine.average import WeightAverage
from reat_fast.engine.distributed import World
from reat_fast.engine.epoch_sums import EpochSums
from reat_fast.engine.memory import shelter_thin_convolutions_
from reat_fast.engine.optimizer import load_optimizer, make_optimizer
from reat_fast.engine.precision import resolve_precision
from reat_fast.engine.step_attack import StepAttack
from reat_fast.engine.step_update import StepUpdate
from reat_fast.kernels.prepare import prepare
from reat_fast.loaders import Batch
from reat_fast.methods.attacks import AttackPlan, FreePerturbation
from reat_fast.methods.objectives import make_objective
from reat_fast.networks.architectures import Network
from reat_fast.networks.tracing import is_foreign
from reat_fast.objective import ClassStatistics

__all__ = ["TrainStep", "load_optimizer", "make_optimizer"]


class TrainStep:
    """Take training steps of a method on a model, by the fused form.

    model: a network on its device, of reat_fast.models or one that has what docs/sharing.md names;
    optimizer: any that updates its parameters (make_optimizer for one that can be captured);
    counts: training images per class. world: the processes that train together; each takes its
    share of every batch.
    Errors: ValueError for counts that are not one whole number, 0 or more, a class of the model,
    and for a network that lacks what it needs; of a step for one that does not keep its buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        counts: Sequence[int],
        config: Config,
        world: World | None = None,
    ) -> None:
        model = step_checks.checked_network(model)
        weight = next(model.parameters())
        device = weight.device
        counts = step_checks.checked_counts(counts, model.fc.out_features)
        if device.type == "cpu":
            shelter_thin_convolutions_(model)
        self.model = model
        self.optimizer = optimizer
        self.config = config
        self.world = world or World()
        self.world.take_from_main_(model.state_dict().values())
        self.statistics = ClassStatistics(counts, device, weight.dtype)
        self.average = WeightAverage(model, config.ema) if config.ema else None
        self.objective = make_objective(model, self.statistics, config)
        self.epoch = torch.zeros((), dtype=torch.int64, device=device)
        self.sums = EpochSums(self.objective.terms, device)
        self.dtype = weight.dtype
        self._low = resolve_precision(config, device) == "bf16"
        self._free: FreePerturbation | None = None
        self.attack = StepAttack(model, self.statistics, counts, config, self._autocast)
        self.update = StepUpdate(
            model,
            optimizer,
            self.objective,
            self.statistics,
            self.sums,
            self.epoch,
            config,
            self.world,
            self._update_autocast,
        )
        self._buffers = dict(model.named_buffers()) if is_foreign(model) else None

    @property
    def plan(self) -> AttackPlan:
        """The numbers of the attack in the running epoch."""
        return self.attack.plan

    @property
    def kind(self) -> tuple[object, ...]:
        """What makes a step of the running epoch another one than those of other epochs."""
        return self.plan, self.update.perturbs

    @property
    def bad_step(self) -> Tensor:
        """The first step of the epoch whose loss was not finite, or -1: int64, on the device."""
        return self.sums.bad_step

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
            self.attack.noise_scale(batch.labels, self.epoch),
            gather=gather,
            padding=4 if config.augment else 0,
            flip=config.augment,
            noise=self.plan.noise,
        )
        images, adv_start = (pixels.to(self.dtype) for pixels in (images, adv_start))
        return self._step(images, batch.labels, self.plan.settle_(adv_start), total)

    def __call__(
        self, images: Tensor, labels: Tensor, start: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Take one step on images [B, C, H, W] in [0, 1] with labels int64 [B]; may not sync.

        start: noise like images, or None for what the attack draws, U(-eps, eps) in REAT; one-step
        attacks begin within [0, 1] in any case.
        Returns images_adv [B, C, H, W], logits [B, K] before the update, the loss and its terms
        (scalars; bsl and tail in REAT), all detached. Leaves the model in train mode.
        Errors: ValueError for no images, images that are not of the model's type and labels of
        another shape or type; on a CPU for labels of no class and pixels outside of [0, 1], too,
        which would have to be waited for elsewhere.
        """
        classes = len(self.statistics.counts)
        step_checks.refuse_misfits(images, labels, start, self.dtype, classes)
        scale = self.attack.noise_scale(labels, self.epoch)
        begin = self.plan.draw_start(images, scale) if start is None else images + start
        return self._step(images, labels, self.plan.settle_(begin), len(labels))

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
        means["nonfinite"] = int(self.sums.nonfinite)
        self.sums.clear_()
        self.epoch += 1
        self.begin_epoch()
        return means

    @property
    def unfolded(self) -> list[str]:
        """Names of the BatchNorms that the attack does not fold into a convolution."""
        return [] if self.attack.network is None else self.attack.network.unfolded

    def evaluated_network(self) -> Network:
        """Return what is evaluated and saved: the averaged network where there is one."""
        return self.model if self.average is None else self.average.network()

    def running_means(self) -> dict[str, float]:
        """Return the means of the epoch so far; syncs."""
        return self.sums.means()

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beside the weights and the optimiser."""
        average = {} if self.average is None else self.average.state_dict()
        free = {} if self._free is None else self._free.state_dict()
        return {
            **self.statistics.state_dict(),
            **average,
            **free,
            **self.sums.state_dict(),
            "epoch": self.epoch,
        }

    def state_tensors(self) -> list[Tensor]:
        """Return every tensor that a step changes and the next one reads, the model's included."""
        momentum = [
            value
            for slots in self.optimizer.state.values()
            for value in slots.values()
            if isinstance(value, Tensor)
        ]
        # Not its state_dict, which lacks the buffers that a network does not save.
        model = [weight.detach() for weight in self.model.parameters()]
        model += self.model.buffers()
        return [*model, *momentum, *self.state_dict().values(), self.statistics.weights]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state, into the same memory."""
        self.statistics.load_state_dict(state)
        if self.average is not None:
            self.average.load_state_dict(state)
        if "free_perturbation" in state:
            self.allocate(state["free_perturbation"].to(self.epoch.device))
        if self._free is not None:
            self._free.load_state_dict(state)
        self.sums.load_state_dict(state)
        self.epoch.copy_(state["epoch"])
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Take up what the host has to know of the epoch that the step is in; syncs."""
        epoch = int(self.epoch)
        self.attack.begin_epoch(epoch)
        self.update.begin_epoch(epoch)

    def _step(
        self, images: Tensor, labels: Tensor, adv_start: Tensor, total: int
    ) -> dict[str, Tensor]:
        """Take one step on this process's share of a batch of `total` images."""
        self.model.train()
        self.attack.refresh()
        if self.config.attack == "free":
            outcome = self._free_updates(images, labels, total)
        else:
            images_adv = self.attack.examples(
                images,
                labels,
                adv_start,
                parts=[rows for rows, _ in self.update.parts(total)],
                epoch=self.epoch,
                nonfinite=self.update.nonfinite,
            )
            outcome = self.update(images, images_adv, labels, total)
        if self.average is not None:
            self.average.update_()
        if self._buffers is not None:
            step_checks.refuse_moved_buffers(self.model, self._buffers)
        return outcome

    def _free_updates(self, images: Tensor, labels: Tensor, total: int) -> dict[str, Tensor]:
        """Update `replays` times on one batch, each time moving the perturbation after it."""
        self.allocate(images)
        assert self._free is not None
        for _ in range(self.config.replays):
            attacked = self._free.attacked(images)
            outcome = self.update(images, attacked, labels, total)
            self._free.update_(attacked, images, self.update.nonfinite)
        return outcome

    def _autocast(self) -> torch.autocast:
        return self._low_where(self._low)

    def _update_autocast(self) -> torch.autocast:
        # Not on a CPU: weight gradients of small maps in bfloat16 are NaN there at times (PyTorch
        # 2.13, AVX-512), and the update is a small part of the step.
        return self._low_where(self._low and self.epoch.device.type != "cpu")

    def _low_where(self, enabled: bool) -> torch.autocast:
        # No cache: casts kept from outside a capture would be stale in its replays.
        device, dtype = self.epoch.device.type, torch.bfloat16
        return torch.autocast(device, dtype, enabled=enabled, cache_enabled=False)

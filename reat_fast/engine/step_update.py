"""The update of a training step: objective, backward, sums over processes, optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from reat_fast.config import Config
from reat_fast.engine.distributed import (
    SharedGradients,
    World,
    split,
)
from reat_fast.engine.epoch_sums import EpochSums
from reat_fast.engine.precision import resolve_precision
from reat_fast.engine.synced_batchnorm import running_statistics, synchronise_batchnorm_
from reat_fast.kernels import triton_support
from reat_fast.methods.objectives import Forward, Objective, Part
from reat_fast.methods.weight_perturbation import WeightPerturbation, statistics_kept
from reat_fast.networks.architectures import Network
from reat_fast.networks.compiling import compile_whole, require_compiler
from reat_fast.networks.fused_update import FusedUpdate, fused_update_pays
from reat_fast.networks.tracing import is_foreign
from reat_fast.objective import ClassStatistics

UpdateForm = Literal["eager", "fused", "compiled"]


def resolve_update_form(config: Config, device: torch.device, world: World) -> UpdateForm:
    """Say how the update computes when the configuration leaves it open."""
    if config.update_form != "auto":
        return config.update_form
    low = config.fused and resolve_precision(config, device) == "bf16"
    alone = world.size == 1 or not config.sync_batchnorm
    # Without a graph it has as many kernels as PyTorch's form, which cost the host more.
    replayed = config.graph != "off"
    return "fused" if low and alone and replayed and fused_update_pays(device) else "eager"


class StepUpdate:
    """Update the weights of a network by the gradient of an objective, on adversarial examples.

    All of it is that of the step: its network, optimiser, objective, statistics, sums, epoch
    (int64, on the device), configuration and processes. autocast: makes the context in which the
    network computes. form: how it does.
    Errors: ValueError for a fused or compiled update that cannot be.
    """

    def __init__(
        self,
        model: Network,
        optimizer: torch.optim.Optimizer,
        objective: Objective,
        statistics: ClassStatistics,
        sums: EpochSums,
        epoch: Tensor,
        config: Config,
        world: World,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self._model, self._optimizer, self._objective = model, optimizer, objective
        self._statistics, self._sums, self._epoch = statistics, sums, epoch
        self._config, self._world, self._autocast = config, world, autocast
        self.form = resolve_update_form(config, epoch.device, world)
        if self.form == "fused" and config.update_form == "auto" and is_foreign(model):
            self.form = "eager"  # its own code may do what a trace does not see
        self._features_logits = _features_logits(self.form, model, config, epoch.device, world)
        if isinstance(self._features_logits, FusedUpdate) and not self._features_logits.fused:
            self.form = "eager"  # the network is not one that can be rewritten
        self._awp = WeightPerturbation(model, config.awp) if config.awp else None
        self.perturbs = False
        """Whether weights are perturbed in the running epoch."""
        self.begin_epoch(0)
        self._shared: SharedGradients | None = None
        self._histogram = statistics.next_ae_counts
        self.nonfinite = sums.nonfinite
        """int64, to which whoever attacks adds the bad gradient elements of this process."""
        self._running: list[Tensor] = []
        """Of BatchNorms that look at one process's share each; synchronised ones agree anyway."""
        if world.size > 1:
            if config.sync_batchnorm:
                synchronise_batchnorm_(model, world)
            else:
                self._running = running_statistics(model)
            self._histogram = torch.zeros_like(self._histogram)
            self.nonfinite = torch.zeros_like(self.nonfinite)
            summed = len(objective.terms) + 3 + len(self._histogram)
            self._shared = SharedGradients(list(model.parameters()), summed, world)

    def __call__(
        self, images: Tensor, images_adv: Tensor, labels: Tensor, total: int
    ) -> dict[str, Tensor]:
        """Update by this process's share of a batch of `total` images; may not sync.

        Where AWP asks, the gradient is taken at worse weights. Returns what TrainStep does.
        """
        if self._awp is None or not self.perturbs:
            return self._descend(images, images_adv, labels, total)
        with statistics_kept(self._model):
            self._gradients(images, images_adv, labels, total, torch.zeros_like(self._histogram))
            if self._shared is not None:
                self._shared.sum_()
        with self._awp.perturbed():
            return self._descend(images, images_adv, labels, total)

    def begin_epoch(self, epoch: int) -> None:
        """Take up what the host has to know of an epoch, counted from 0."""
        self.perturbs = self._awp is not None and epoch >= self._config.awp_from

    def parts(self, total: int) -> Iterator[tuple[slice, list[int]]]:
        """Yield this process's rows of each part of a batch, and the rows every process has."""
        world = self._world
        per_process = [split(n, self._config.accumulate) for n in split(total, world.size)]
        first = 0
        for sizes in zip(*per_process, strict=True):
            if any(sizes):
                rows = slice(first, first := first + sizes[world.rank])
                yield rows, list(sizes)

    def share_and_record(self, outcome: dict[str, Tensor], labels: Tensor) -> None:
        """Sum gradients and statistics over the processes; complete the outcome, keep the sums."""
        names, size = self._objective.terms, self._world.size
        correct = (outcome["logits"].argmax(1) == labels).sum()
        # Each process knows its part of most terms, and all of them the whole of the others.
        own = [outcome[name] / (size if name in self._objective.whole else 1) for name in names]
        own += [correct, labels.new_full((), labels.numel())]
        sums = torch.stack([value.double() for value in own])
        if self._shared is not None:
            counted = torch.cat([self.nonfinite[None], self._histogram]).double()
            sums = self._shared.sum_(torch.cat([sums, counted])).double()
            counted = sums[len(own) :].long()
            self._sums.nonfinite += counted[0]
            self._statistics.next_ae_counts += counted[1:]
            self.nonfinite.zero_()
            self._histogram.zero_()
            outcome |= {n: t.to(outcome[n].dtype) for n, t in zip(names, sums, strict=False)}
        outcome["loss"] = torch.stack([outcome[name] for name in names]).sum()
        terms, (correct, samples) = sums[: len(names)], sums[len(names) : len(own)]
        self._sums.add_(outcome["loss"], terms, correct, samples)

    def _descend(
        self, images: Tensor, images_adv: Tensor, labels: Tensor, total: int
    ) -> dict[str, Tensor]:
        outcome = self._gradients(images, images_adv, labels, total, self._histogram)
        self.share_and_record(outcome, labels)
        self._world.average_(self._running, len(labels) / total)
        if self._config.clip_norm:
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), self._config.clip_norm)
        self._optimizer.step()
        return outcome | {"images_adv": images_adv.detach()}

    def _gradients(
        self, images: Tensor, images_adv: Tensor, labels: Tensor, total: int, histogram: Tensor
    ) -> dict[str, Tensor]:
        """Leave the gradient of the objective in grad; returns its terms and the logits."""
        # What autograd finds no gradient in, it need not add to; the shared buffer has to stay.
        self._optimizer.zero_grad(set_to_none=self._shared is None)
        logits: list[Tensor] = []
        terms: list[dict[str, Tensor]] = []
        for rows, sizes in self.parts(total):
            part = Part(
                images[rows],
                images_adv[rows],
                labels[rows],
                total,
                self._epoch,
                histogram,
                partial(self._world.gather, sizes=sizes),
            )
            found, values = self._objective.compute(self._forward, part)
            torch.stack(list(values.values())).sum().backward()
            logits.append(found.detach())
            terms.append({name: value.detach() for name, value in values.items()})
        summed = {name: torch.stack([t[name] for t in terms]).sum(0) for name in terms[0]}
        return {"logits": logits[0] if len(logits) == 1 else torch.cat(logits), **summed}

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast():
            return self._features_logits(images)


def _features_logits(
    form: UpdateForm, model: Network, config: Config, device: torch.device, world: World
) -> Forward:
    """Return what computes features and logits in a form."""
    if form == "eager":
        return model.forward_features_logits
    flag = f"--update-form {form}"
    if form == "fused":
        _require_fused(flag, config, device, world)
        return FusedUpdate(model, "triton")
    if world.size > 1:  # BatchNorm sums over the processes, which no compiled graph can hold
        raise ValueError(f"{flag}: works in one process; leave it out")
    require_compiler(flag, device)
    return compile_whole(model.forward_features_logits, flag)


def _require_fused(flag: str, config: Config, device: torch.device, world: World) -> None:
    """Raise ValueError where no BatchNorm would be computed by a kernel of ours."""
    if world.size > 1 and config.sync_batchnorm:
        raise ValueError(
            f"{flag}: its BatchNorm is of one process; add --no-sync-batchnorm, or leave it out"
        )
    if not triton_support.kernel_runs_on(torch.empty(0, device=device)):
        raise ValueError(f"{flag}: needs Triton and a CUDA device; leave it out")

"""Gradient ascent from a CUDA graph: one step, captured once and replayed for every step.

Launching the kernels of a step takes longer than running them where the network computes in
bfloat16. Radius, step size and number of steps are no part of the graph, so that all attacks with
one loss in one norm share it. Images do not meet in an attack: a short batch is filled up with
copies of its rows, which are cut off again.
"""

from __future__ import annotations

import warnings
from types import TracebackType

import torch
from torch import Tensor

from reat_fast.attack import Norm, ascend_
from reat_fast.cli.terminal import first_line
from reat_fast.engine.graph import (
    WARM_UP_STEPS,
    attack_stream,
    baked_settings,
    can_capture,
    record,
    refuse_changed_settings,
    refuse_waiting,
    warm_up,
)
from reat_fast.evaluation.attacks import LOSSES, Attack
from reat_fast.evaluation.victim import Victim
from reat_fast.methods.work import WITH_GRADIENT

# Before it is replayed a step is launched to warm up, checked and captured, five times in all: a
# graph has to be replayed a few times as often to save anything.
WORTHWHILE_STEPS = 4 * (WARM_UP_STEPS + 2)


class CapturedAscent:
    """Replay one step of ascent on batches of one shape, for all attacks with one loss and norm.

    loss: a name in attacks.LOSSES. size: images of a whole batch; clean [B, C, H, W]: images of the
    batches to come, on a CUDA device, whose number and values do not matter.
    Errors: RuntimeError for a network that cannot be captured.
    """

    def __init__(
        self, victim: Victim, loss: str, size: int, clean: Tensor, norm: Norm = "linf"
    ) -> None:
        self.loss, self.norm = loss, norm
        self._victim = victim
        shape, strides = (size, *clean.shape[1:]), (clean[0].numel(), *clean.stride()[1:])
        self._clean = clean.new_empty_strided(shape, strides).zero_()
        self._adv = self._clean.clone()
        self._labels = torch.zeros(size, dtype=torch.int64, device=clean.device)
        self._eps, self._step_size = clean.new_zeros(()), clean.new_zeros(())
        self._settings = baked_settings()
        self._graph = torch.cuda.CUDAGraph()
        self._capture()

    def perturb(
        self, attack: Attack, clean: Tensor, start: Tensor, labels: Tensor, eps: float
    ) -> Tensor:
        """Return what attack.perturb returns for a batch of at most the captured size; never syncs.

        Errors: ValueError for no images or too many, another shape, dtype, device, loss or setting,
        and for an attack without steps.
        """
        self._refuse_changes(attack, clean, start, labels)
        _fill_(self._adv, attack.begin(clean, start))
        _fill_(self._clean, clean)
        _fill_(self._labels, labels)
        self._eps.fill_(attack.radius(eps))
        self._step_size.fill_(attack.step_size)
        for _ in range(attack.steps):
            self._graph.replay()
            self._victim.count(len(clean) * WITH_GRADIENT)
        return self._outcome[: len(clean)].clone()

    def serves(self, attack: Attack) -> bool:
        """Say whether the steps of an attack are those that were captured."""
        return attack.loss == self.loss and attack.norm == self.norm

    def close(self) -> None:
        """Free the graph and its memory."""
        torch.cuda.synchronize()
        self._graph.reset()
        del self._outcome
        torch.cuda.empty_cache()

    def _capture(self) -> None:
        stream = attack_stream(self._clean.device)
        warm_up(self._step, stream)
        with torch.cuda.stream(stream):
            refuse_waiting(self._step)
        # Threads of a loader may be at work, and are no part of this.
        self._outcome = record(self._graph, self._step, stream, "thread_local")

    def _step(self) -> Tensor:
        """Take one step from where self._adv stands, in place; return the images it leads to."""
        return ascend_(
            self._victim.logits,
            self._adv,
            self._clean,
            self._labels,
            eps=self._eps,
            step_size=self._step_size,
            steps=1,
            loss=LOSSES[self.loss],
            norm=self.norm,
        )

    def _refuse_changes(self, attack: Attack, clean: Tensor, start: Tensor, labels: Tensor) -> None:
        if not self.serves(attack) or attack.steps < 1:
            raise ValueError(
                f"{attack.name}: steps on the loss {self.loss} in {self.norm} were captured"
            )
        for name, given, fixed in (
            ("clean images", clean, self._clean),
            ("starts", start, self._clean),
            ("labels", labels, self._labels),
        ):
            fits = 1 <= len(given) <= len(fixed) and given.shape[1:] == fixed.shape[1:]
            same = given.dtype == fixed.dtype and given.device == fixed.device
            if not (fits and same and len(given) == len(clean)):
                raise ValueError(
                    f"{name} are {given.dtype} {list(given.shape)} on {given.device}, captured "
                    f"were up to {fixed.dtype} {list(fixed.shape)} on {fixed.device}: capture again"
                )
        refuse_changed_settings(self._settings)


class Ascents:
    """Take the steps of attacks on one victim, from a graph on a GPU where that is worth it.

    size: images of a whole batch. There is one graph at a time, that of the last loss and norm;
    leaving the block frees it.
    """

    def __init__(self, victim: Victim, size: int) -> None:
        self._victim, self._size = victim, size
        self._captured: CapturedAscent | None = None
        self._failed = False

    def perturb(
        self,
        attack: Attack,
        clean: Tensor,
        start: Tensor,
        labels: Tensor,
        eps: float,
        steps_in_all: int,
    ) -> Tensor:
        """Return adversarial images as attack.perturb does, see there.

        steps_in_all: how many steps on batches the attack takes from its beginning to its end.
        """
        captured = self._captured_for(attack, clean, steps_in_all)
        if captured is None:
            return attack.perturb(self._victim, clean, start, labels, eps)
        return captured.perturb(attack, clean, start, labels, eps)

    def close(self) -> None:
        """Free the graph, where there is one; the next attack makes another."""
        if self._captured is not None:
            self._captured.close()
            self._captured = None

    def __enter__(self) -> Ascents:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _captured_for(
        self, attack: Attack, clean: Tensor, steps_in_all: int
    ) -> CapturedAscent | None:
        if not can_capture(clean.device) or not attack.steps or self._failed:
            return None
        if self._captured is not None and self._captured.serves(attack):
            return self._captured
        if steps_in_all < WORTHWHILE_STEPS:
            return None
        self.close()
        try:
            self._captured = CapturedAscent(
                self._victim, attack.loss, self._size, clean, attack.norm
            )
        except RuntimeError as error:
            self._failed = True
            torch.cuda.synchronize()  # steps begun in vain write to memory that is freed now
            warnings.warn(
                f"{attack.name}: a step of the attack cannot be captured as a CUDA graph "
                f"({first_line(error)}); steps are launched one by one, which is slower",
                stacklevel=2,
            )
        return self._captured


def _fill_(buffer: Tensor, batch: Tensor) -> None:
    """Write a batch into a buffer that is as long or longer, its rows in turn up to the end."""
    if len(batch) < len(buffer):
        batch = batch[torch.arange(len(buffer), device=batch.device) % len(batch)]
    buffer.copy_(batch)

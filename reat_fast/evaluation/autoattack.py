"""AutoAttack, standard version, in L-infinity or L2: four attacks in turn on what still stands.

APGD on the cross-entropy, APGD on the targeted DLR loss, FAB-T and Square, as in Croce and Hein,
ICML 2020 (arXiv 2003.01690). An image leaves as soon as the model itself, in float32, gets it
wrong; the next run gets full batches of what is left. Random numbers belong to (seed, image), so
neither the batch size nor a break changes a figure.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from reat_fast.attack import Norm
from reat_fast.engine.precision import Precision
from reat_fast.evaluation import apgd, batches, guards
from reat_fast.evaluation.ball import Ball
from reat_fast.evaluation.fab import fab
from reat_fast.evaluation.search_state import SearchState, Standing, Within
from reat_fast.evaluation.square import Reached, square
from reat_fast.evaluation.victim import Victim, attacked
from reat_fast.kernels import philox
from reat_fast.methods.work import FORWARD, WITH_GRADIENT
from reat_fast.storage.save_pace import SavePace

MOST_TARGETS = 9
SAVE_EVERY_SECONDS = 10.0
FORMAT = 3
"""Of the state that a search leaves: one of another format is not gone on from."""

Images = Callable[[Tensor], Tensor]
"""Give the images [B, C, H, W] in [0, 1] at rows, int64 [B] on the CPU, on the victim's device."""


def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    seed: int = 0,
    precision: Precision = "float32",
    batch_size: int = 500,
    norm: Norm = "linf",
) -> Tensor:
    """Return which images the model classifies right whatever AutoAttack does to them, bool [N].

    images [N, C, H, W] in [0, 1] and labels int64 [N], on the device of the model, which is in eval
    mode. The mean of the result is the robust accuracy. norm: that of eps, "linf" or "l2", where
    128/255 is usual. precision: see AutoAttack.
    Errors: ValueError for fewer than four classes, images and labels that do not fit each other or
    the model, a radius that is none, and for what guards.refuse finds; FloatingPointError for
    logits that are NaN or infinite.
    """
    guards.refuse_misfits(model, images, labels, eps, norm, batch_size)
    guards.refuse(model, images[:batch_size], labels)
    with attacked(model, precision) as victim:
        victim.check(images[: guards.LOOKED_AT])
        search = AutoAttack(
            victim,
            lambda rows: images[rows.to(images.device)],
            labels.cpu(),
            eps=eps,
            seed=seed,
            batch_size=batch_size,
            norm=norm,
        )
        return search.run().robust.to(labels.device)


class AutoAttack:
    """A search for fooling images that may be broken off and gone on with.

    labels: int64 [N] on the CPU. A victim that searches in bf16 or tf32 may miss an image, but none
    is counted that its model in float32 does not confirm; FAB-T never uses bf16. steps, queries: of
    the gradient attacks and of Square; the standard is the default. state: what to go on from, if
    the same search wrote it, and to keep up to date. numbers: int64 [N] on the CPU, whose random
    numbers each image takes; None: in their order. norm: that of eps.
    Errors: ValueError for fewer than four classes.
    """

    def __init__(
        self,
        victim: Victim,
        images: Images,
        labels: Tensor,
        *,
        eps: float,
        seed: int,
        batch_size: int,
        steps: int = 100,
        queries: int = 5000,
        state: SearchState | None = None,
        numbers: Tensor | None = None,
        norm: Norm = "linf",
    ) -> None:
        self.victim, self.images, self.labels = victim, images, labels
        self.ball, self.seed, self.batch_size = Ball(norm, eps), seed, batch_size
        self.steps, self.queries = steps, queries
        classes = victim.true_logits(images(torch.arange(1))).shape[1]
        guards.refuse_few_classes(classes)
        ranks = range(1, min(MOST_TARGETS, classes - 1) + 1)
        self.runs = [
            ("clean", 0),
            ("apgd-ce", 0),
            *(("apgd-t", rank) for rank in ranks),
            *(("fab-t", rank) for rank in ranks),
            ("square", 0),
        ]
        """Each with the rank of the class it aims at, among the logits of the clean image."""
        self._numbers = torch.arange(len(labels)) if numbers is None else numbers
        self._state = state
        self._pace = SavePace()
        self._stage_began = 0.0
        begun = state.read(self._fingerprint()) if state else None
        begun = begun or {"robust": torch.ones(len(labels), dtype=torch.bool)}
        within = begun.pop("within", None)
        self._within = None if within is None else Within.loaded(**within)
        self.standing = Standing(**begun)

    def run(self) -> Standing:
        """Search to the end; returns which images stand.

        The state stays, and a search that finds it at its end has nothing to do: whoever gave it
        removes it once the result is kept.
        """
        standing, self._stage_began = self.standing, time.monotonic()
        try:
            with self.victim.replaying():
                while standing.run < len(self.runs):
                    self._run_next(standing)
        finally:  # broken off, too: what fell need not be searched again
            self._write(at_end=True)
        return standing

    def _run_next(self, standing: Standing) -> None:
        """Take the next run, or what is left of it, on all images that stand."""
        stage, rank = self.runs[standing.run]
        if standing.pending is None:
            standing.pending = standing.robust.nonzero().squeeze(1)
        while len(standing.pending):
            batch, rows = self._next_batch(standing.pending)
            self._announce(stage, rank)
            stand = torch.zeros(len(batch), dtype=torch.bool)
            stand[torch.isin(batch, rows)] = self._survive(stage, rank, rows)
            self.victim.refuse_nonfinite()  # before it counts, and a state keeps it
            self._within = None
            standing.robust[batch] = stand
            standing.pending = standing.pending[len(batch) :]
            self._write()
        # In this order, for a signal may come between the lines.
        standing.after[stage] = int(standing.robust.sum())
        standing.run, standing.pending = standing.run + 1, None
        if stage not in [later for later, _ in self.runs[standing.run :]]:
            title = "AutoAttack" if self.ball.norm == "linf" else "L2 AutoAttack"
            share = 100 * standing.after[stage] / max(len(self.labels), 1)
            now = time.monotonic()
            took, self._stage_began = now - self._stage_began, now
            self.victim.say(f"{title}: {share:.2f} % stand after {stage}, {took:.0f} s")

    def _next_batch(self, pending: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next of the pending images, and those of them that have not fallen yet."""
        if self._within is not None and self._within.size <= self.batch_size:
            return pending[: self._within.size], self._within.left
        self._within = None  # made where more fit at once: from its first query again
        # Batches of one size: a GPU takes as long for a small one as for half a large one.
        batch = pending[: batches.even(len(pending), self.batch_size)]
        return batch, batch

    def _survive(self, stage: str, rank: int, rows: Tensor) -> Tensor:
        """Attack the images at rows once; returns which of them stand, bool [B] on the CPU."""
        clean = self.images(rows).to(self.victim.dtype)
        samples, labels = (t.to(clean.device) for t in (self._numbers[rows], self.labels[rows]))
        adv = self._perturb(stage, rank, clean, labels, samples, rows)
        assert self.ball.holds(adv, clean)
        return ~self.victim.fooled(adv, labels).cpu()

    def _perturb(
        self,
        stage: str,
        rank: int,
        clean: Tensor,
        labels: Tensor,
        samples: Tensor,
        rows: Tensor,
    ) -> Tensor:
        victim, ball = self.victim, self.ball
        settings: dict[str, Any] = {"eps": ball.eps, "norm": ball.norm}
        if stage == "clean":
            return clean
        if stage == "square":
            return self._square(clean, labels, samples, rows)
        targets = victim.true_logits(clean).argsort(1, descending=True)[:, rank]
        if stage == "fab-t":
            # It aims at where two logits meet, and bfloat16 cannot tell where that is: of 79 images
            # FAB left 56 in bfloat16 and 50 in float32, where Auto-PGD found the same in both.
            with victim.finer(clean):
                return fab(victim, clean, labels, targets, steps=self.steps, **settings)
        objective = apgd.targeted_dlr if stage == "apgd-t" else apgd.cross_entropy
        noise = ball.to_surface(self._noise(clean, rank, samples))
        return apgd.apgd(
            victim, clean, labels, targets, noise, objective, steps=self.steps, **settings
        )

    def _square(self, clean: Tensor, labels: Tensor, samples: Tensor, rows: Tensor) -> Tensor:
        """Run Square, of which a batch may take hours on a CPU; the state has what it reached."""
        begun = self._within
        size = len(rows) if begun is None else begun.size

        def keep(reached: Reached) -> None:
            if len(reached.rows):
                self._within = Within(size, rows, reached)
            self._write()

        # It keeps what lowers the margin, in steps of which bfloat16 sees the large ones only.
        with self.victim.finer(clean):
            return square(
                self.victim,
                clean,
                labels,
                samples,
                eps=self.ball.eps,
                norm=self.ball.norm,
                seed=self.seed,
                queries=self.queries,
                begun=None if begun is None else begun.reached.on(clean.device),
                report=keep,
            )

    def _noise(self, clean: Tensor, run: int, samples: Tensor) -> Tensor:
        """Draw noise like clean: in L-infinity evenly, in L2 from the normal distribution."""
        # Normal numbers come in pairs.
        count = clean[0].numel() + clean[0].numel() % 2 * (self.ball.norm == "l2")
        words = philox.random_bits(self.seed, run, samples, philox.EVALUATION, count)
        even = self.ball.norm == "linf"
        noise = 2 * philox.uniform(words) - 1 if even else philox.normal(words)
        return noise[:, : clean[0].numel()].to(clean.dtype).view_as(clean)

    def _announce(self, stage: str, rank: int) -> None:
        """Tell the progress bar what runs and how many passes are left if nothing more falls."""
        # Steps, and what is seen once: where a search begins, what it aims at, its best, a verdict.
        gradients = WITH_GRADIENT * (self.steps + 1) + 3 * FORWARD
        cost = {
            "clean": FORWARD,
            "apgd-ce": gradients,
            "apgd-t": gradients,
            "fab-t": (WITH_GRADIENT + FORWARD) * self.steps + 2 * FORWARD,
            "square": FORWARD * (self.queries + 2),
        }
        standing = self.standing
        assert standing.pending is not None
        left = int(standing.robust.sum())
        later = sum(cost[name] for name, _ in self.runs[standing.run + 1 :])
        passes = len(standing.pending) * cost[stage] + left * later
        if self._within is not None:
            passes -= FORWARD * self._within.reached.queries * len(self._within.left)
        target = f" {rank}" if rank else ""
        name = "aa" if self.ball.norm == "linf" else "l2aa"
        self.victim.expect(f"{name} {stage}{target}, {left} images stand", passes)

    def _fingerprint(self) -> str:
        """Name the search: its weights, settings, labels and first images."""
        victim = self.victim
        settings = FORMAT, self.ball, self.seed, self.steps, self.queries, victim.precision
        digest = hashlib.sha256(repr(settings).encode())
        few = self.images(torch.arange(min(len(self.labels), 8)))
        in_order = torch.equal(self._numbers, torch.arange(len(self.labels)))
        tensors = (self.labels, few) if in_order else (self.labels, few, self._numbers)
        for tensor in (*victim.model.state_dict().values(), *tensors):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _write(self, at_end: bool = False) -> None:
        pace = self._pace
        due = at_end or (pace.age >= SAVE_EVERY_SECONDS and pace.affordable())
        if self._state is None or not due:
            return
        within = self._within
        if within is not None and not self.victim.finite:
            within = None  # it may have counted on what is no number
        with pace.saving():
            saved = None if within is None else within.saved()
            self._state.write({**asdict(self.standing), "within": saved})

"""Right verdicts by class: numbers that processes add up before a percentage is formed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reat_fast.engine.distributed import World
from reat_fast.evaluation.figures import figures


@dataclass(frozen=True)
class Tally:
    """What attacks left standing of a set, or of the share that one process looked at."""

    samples: Tensor
    """Images per class, int64 [C] on the CPU."""
    right: dict[str, Tensor] = field(default_factory=dict)
    """Per attack, those that the model gets right under it, int64 [C]."""
    after: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Per AutoAttack, how many images stand after each of its attacks, int64 scalars."""

    def summed(self, world: World) -> Tally:
        """Return the sum over the processes, each of which has to ask."""
        if world.size == 1:
            return self
        every = [self.samples, *self.right.values()]
        stages = [number for stages in self.after.values() for number in stages.values()]
        numbers = world.sum_(torch.cat([*every, *(number.view(1) for number in stages)]))
        classes = len(self.samples)
        rows, rest = numbers.split([classes * len(every), len(stages)])
        samples, *right = rows.split(classes)
        left = iter(rest)
        return Tally(
            samples,
            dict(zip(self.right, right, strict=True)),
            {name: {stage: next(left) for stage in own} for name, own in self.after.items()},
        )

    def result(self, train_counts: Sequence[int] | None = None) -> dict[str, Any]:
        """Return what measure.evaluate does; train_counts: training images per class."""
        samples, count = self.samples.tolist(), int(self.samples.sum())
        found = {
            name: figures(right.tolist(), samples, train_counts)
            for name, right in self.right.items()
        }
        for name, stages in self.after.items():
            found[name]["after"] = {
                stage: 100 * int(number) / max(count, 1) for stage, number in stages.items()
            }
        return {"samples": count, "per_class_samples": samples, "attacks": found}

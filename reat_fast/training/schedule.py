"""Learning rate over time, as a function of the position in the run."""

from __future__ import annotations

import math

from reat_fast.config import Config


def learning_rate(config: Config, progress: float) -> float:
    """Return the learning rate at `progress`, the epochs done so far as a fraction of one counts.

    multistep: lr * gamma^(milestones passed), constant within an epoch, as the official recipe.
    onecycle: linear from 0 up to lr over the warm-up share of the run and back to 0.
    cosine: half a cosine from lr to 0. constant: lr.
    """
    share = progress / config.epochs
    match config.schedule:
        case "multistep":
            passed = sum(int(progress) >= milestone for milestone in config.milestones)
            return config.lr * config.gamma**passed
        case "onecycle":
            if share < config.warmup:
                return config.lr * share / config.warmup
            return config.lr * (1 - share) / max(1 - config.warmup, 1e-12)
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * share))
        case "constant":
            return config.lr

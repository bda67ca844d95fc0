"""What a run measures of itself and prints: the time of a step, the size of the tail penalty."""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reat_fast.attack import pgd
from reat_fast.engine.memory import forget_peak_memory
from reat_fast.engine.precision import full_precision, low_dtype, resolve_precision
from reat_fast.methods.penalty_size import tail_gradient_share
from reat_fast.networks.frozen import FrozenNetwork, fastest_form
from reat_fast.training.run import Run

BATCHES = 4
"""Batches that the size of the tail penalty is a mean over."""


def seconds_per_step(run: Run) -> float:
    """Time one step of the attack, per image, in the form that starts without compiling.

    On a GPU peak memory is counted anew afterwards: what a run reports is what training took.
    """
    low = low_dtype(resolve_precision(run.config, run.device))
    # So many on a GPU that launching kernels, which a captured step does not do, hardly counts.
    number = 1024 if run.device.type == "cuda" else min(64, run.config.batch_size)
    images, labels = _training_images(run, np.arange(min(number, len(run.splits.train))))
    form = fastest_form(low or torch.float32, run.device)
    frozen = FrozenNetwork(run.model, low, form)

    def seconds() -> float:
        began = time.perf_counter()
        pgd(frozen, images, labels, steps=1).sum().item()
        return time.perf_counter() - began

    seconds()
    fastest = min(seconds() for _ in range(3)) / len(images)
    forget_peak_memory(run.device)
    return fastest


def penalty_share(run: Run) -> float | None:
    """Measure the tail penalty's gradient beside balanced softmax's; None where there is none."""
    config, train = run.config, run.splits.train
    if config.objective != "bsl" or config.tail == "none":
        return None
    mixed = np.random.default_rng(config.seed).permutation(len(train))
    images, labels = _training_images(run, mixed[: BATCHES * config.batch_size])
    with full_precision():
        return tail_gradient_share(
            run.model,
            images,
            labels,
            run.step.statistics,
            form=config.tail,
            coefficient=config.tail_coefficient,
            batch_size=-(-config.batch_size // config.accumulate),  # what fits in training
            eps=config.eps,
            step_size=config.step_size,
            steps=config.steps,
        )


def _training_images(run: Run, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return training images [B, C, H, W] in [0, 1] and their labels, on the device."""
    train = run.splits.train
    images = torch.from_numpy(np.ascontiguousarray(train.images[rows])).to(run.device)
    labels = torch.from_numpy(train.labels[rows]).to(run.device)
    return images.permute(0, 3, 1, 2) / 255, labels

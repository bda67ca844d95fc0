"""What an image costs, in training and under attack, in forward passes of the network."""

from __future__ import annotations

from reat_fast.config import Config
from reat_fast.methods.attacks import EARLY_ATTACK, plan_attack

FORWARD, WITH_GRADIENT, UPDATE = 1, 2, 3
"""Logits; with the gradient of the images, for which weights are constant; with all gradients."""


def work_of_training(config: Config, begin: int = 0) -> int:
    """Return the forward passes that one image costs from an epoch, counted from 0, to the last."""
    return sum(work_per_image(config, epoch) for epoch in range(begin, config.epochs))


def work_per_image(config: Config, epoch: int) -> int:
    """Return the forward passes that one image costs in an epoch, counted from 0.

    tests/test_work.py holds it to the multiplications of real steps.
    """
    batches = 2 if config.objective in ("trades", "mart", "robal") else 1  # clean images too
    if config.attack == "free":
        return UPDATE * batches * config.replays
    name = config.attack if epoch >= config.attack_from else EARLY_ATTACK
    steps = plan_attack(name, eps=0.0, step_size=0.0, steps=config.steps).steps
    attack = WITH_GRADIENT * steps + FORWARD * (config.attack_loss == "kl")
    gradients = 2 if config.awp and epoch >= config.awp_from else 1
    return attack + UPDATE * batches * gradients

"""What an image costs, in training and under attack, in forward passes of the network."""

from __future__ import annotations

from reat_fast.config import Config
from reat_fast.methods.attacks import plan_attack

FORWARD, WITH_GRADIENT, UPDATE = 1, 2, 3
"""Logits; with the gradient of the images, for which weights are constant; with all gradients."""


def work_per_image(config: Config) -> int:
    """Return the forward passes that one image costs in one epoch of a configuration.

    tests/test_work.py holds it to the multiplications of real steps.
    """
    if config.attack == "free":
        return UPDATE * config.replays
    steps = plan_attack(config.attack, eps=0.0, step_size=0.0, steps=config.steps).steps
    attack = WITH_GRADIENT * steps + FORWARD * (config.attack_loss == "kl")
    batches = 2 if config.objective in ("trades", "mart", "robal") else 1  # clean images too
    gradients = 2 if config.awp else 1
    return attack + UPDATE * batches * gradients

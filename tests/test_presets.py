"""The presets have the constants of their published recipes, and the configuration takes them."""

from __future__ import annotations

from typing import Any

import pytest

from reat_fast.config import PRESETS
from reat_fast.methods.attacks import NORMAL_START
from reat_fast.methods.objectives import TAET_SHARE
from reat_fast.methods.presets import METHOD_PRESETS

# Read from the papers and their code, not from the presets: a constant is changed here and there.
COMMON: dict[str, Any] = {
    "dataset": "cifar10",
    "imbalance": 0.02,
    "imbalance_profile": "exp",
    "model": "resnet18",
    "epochs": 80,
    "batch_size": 128,
    "accumulate": 1,
    "sampler": "instance",
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "clip_norm": 0.0,
    "label_smoothing": 0.0,
    "ema": 0.0,
    "schedule": "multistep",
    "milestones": (60, 75),
    "gamma": 0.1,
    "eps": 8 / 255,
    "step_size": 2 / 255,
    "steps": 10,
    "attack": "pgd",
    "attack_from": 0,
    "start": "uniform",
    "radius": "same",
    "attack_loss": "auto",
    "attack_batchnorm": "eval",
    "objective": "bsl",
    "head": "linear",
    "awp": 0.0,
    "awp_from": 0,
    "tail": "official",
    "tail_coefficient": 1.0,
    "augment": True,
    "policy": "none",
    "policy_magnitude": 8,
}
AT_BSL: dict[str, Any] = {
    "epochs": 100,
    "milestones": (75, 90),
    "objective": "bsl",
    "tail": "none",
    "attack_loss": "ce",
    "start": "normal",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "at": {**AT_BSL, "objective": "ce", "start": "uniform"},
    "trades": {**AT_BSL, "objective": "trades", "attack_loss": "kl", "beta": 6.0},
    "mart": {**AT_BSL, "objective": "mart", "beta": 5.0},
    "at-bsl": AT_BSL,
    "at-bsl-ra": {**AT_BSL, "policy": "randaugment"},
    "at-bsl-aua": {**AT_BSL, "policy": "autoaugment"},
    "robal": {
        "batch_size": 64,
        "weight_decay": 2e-4,
        "steps": 5,
        "objective": "robal",
        "tail": "none",
        "attack_loss": "cosine",
        "head": "cosine",
        "head_scale": 10.0,
        "margin": 0.1,
        "margin_tau": 0.3,
        "prior_tau": 1.5,
        "post_tau": 0.1,
        "beta": 6.0,
    },
    "reat": {},
    "reat-batchnorm": {"attack_batchnorm": "train", "attack_loss": "rbl"},
    "reat-offsets": {"attack_loss": "rbl_offsets"},
    "reat-pairwise": {"tail": "pairwise", "tail_coefficient": 1 / 512},
    "taet": {**AT_BSL, "objective": "taet", "second_stage": 40},
    "robustlt": {
        **AT_BSL,
        "radius": "class",
        "radius_alpha": 0.3,
        "radius_warmup": 0.8,
        "start": "uniform",
        "policy": "autoaugment",
        "nesterov": True,
        "attack_batchnorm": "train",
    },
    "awp": {
        **AT_BSL,
        "epochs": 200,
        "milestones": (100, 150),
        "objective": "ce",
        "start": "uniform",
        "awp": 0.005,
    },
    "reat-plus": {
        **AT_BSL,
        "ema": 0.999,
        "policy": "autoaugment",
        "attack_from": 377,
        "steps": 5,
        "step_size": 3 / 255,
        "epochs": 403,
        "milestones": (377, 394),
        "awp": 0.015,
        "awp_from": 377,
        "held_out": 0.0,
    },
}


@pytest.mark.parametrize("name", METHOD_PRESETS)
def test_a_preset_has_the_constants_of_its_published_recipe(name: str) -> None:
    recipe = {**COMMON, **PUBLISHED[name]}
    assert {field: getattr(PRESETS[name], field) for field in recipe} == recipe


def test_every_constant_that_a_preset_sets_is_one_of_its_published_recipe() -> None:
    for name, changes in METHOD_PRESETS.items():
        assert changes.keys() <= COMMON.keys() | PUBLISHED[name].keys()
    assert TAET_SHARE == 0.1 and NORMAL_START == 0.001


@pytest.mark.parametrize("name", METHOD_PRESETS)
def test_the_learning_rate_of_a_preset_drops_before_its_end(name: str) -> None:
    config = PRESETS[name]
    assert config.schedule == "multistep" and max(config.milestones) < config.epochs

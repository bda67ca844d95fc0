"""What each method changes in the default configuration, and where it is published.

The radius is the same for all, 8/255, and the steps of the published ones are of 2/255, whatever
rounding of it a paper's code has; the network is the default one. Methods that were published for
long-tailed data keep their own recipe, the others take that of AT-BSL. Milestones count finished
epochs: codes that count epochs from one drop their learning rate one epoch earlier.
"""

from __future__ import annotations

_CE: dict[str, object] = {"tail": "none", "attack_loss": "ce"}
_RECIPE: dict[str, object] = {"epochs": 100, "milestones": (75, 90), **_CE}
_AT_BSL: dict[str, object] = {**_RECIPE, "objective": "bsl", "start": "normal"}

METHOD_PRESETS: dict[str, dict[str, object]] = {
    # Madry et al., ICLR 2018.
    "at": {**_RECIPE, "objective": "ce"},
    # Zhang et al., ICML 2019: trades.py; beta is the 1/lambda of the paper.
    "trades": {
        **_RECIPE,
        "objective": "trades",
        "attack_loss": "kl",
        "start": "normal",
        "beta": 6.0,
    },
    # Wang et al., ICLR 2020: mart.py; beta from train_resnet.py.
    "mart": {**_RECIPE, "objective": "mart", "start": "normal", "beta": 5.0},
    # Yue et al., CVPR 2024: at_bsl_loss.py, train_at_bsl_cifar10.py.
    "at-bsl": _AT_BSL,
    "at-bsl-ra": {**_AT_BSL, "policy": "randaugment"},
    "at-bsl-aua": {**_AT_BSL, "policy": "autoaugment"},
    # Wu et al., CVPR 2021: cifar10_LT0.02_pgdat_robal_R_train.yaml; post_tau from ..._N_eval.yaml,
    # where ..._R_eval.yaml has none.
    "robal": {
        "batch_size": 64,
        "weight_decay": 2e-4,
        "steps": 5,
        "objective": "robal",
        "tail": "none",
        "attack_loss": "cosine",
        "head": "cosine",
        "head_scale": 10.0,
        "post_tau": 0.1,
        "beta": 6.0,
        "margin": 0.1,
        "margin_tau": 0.3,
        "prior_tau": 1.5,
    },
    # Li et al., arXiv 2307.10205: train.py, loss_functions.py.
    "reat": {},
    # Where samples meet in BatchNorm, RBL reaches the sign of the gradient.
    "reat-batchnorm": {"attack_batchnorm": "train", "attack_loss": "rbl"},
    # The same weights, in a form that reaches the sign in eval mode too.
    "reat-offsets": {"attack_loss": "rbl_offsets"},
    # The penalty its mask was meant for; 1/512 gives it the official size on 512 features.
    "reat-pairwise": {"tail": "pairwise", "tail_coefficient": 1 / 512},
    # Wang et al., CVPR 2025: HARL.py, TAET.ipynb.
    "taet": {
        **_RECIPE,
        "objective": "taet",
        "start": "normal",
        "second_stage": 40,
    },
    # Zhang et al., CVPR 2026: robustlt_atbsl_cifar10.yaml; its attack has train-mode BatchNorm.
    "robustlt": {
        **_AT_BSL,
        "start": "uniform",
        "policy": "autoaugment",
        "nesterov": True,
        "attack_batchnorm": "train",
        "radius": "class",
        "radius_alpha": 0.3,
        "radius_warmup": 0.8,
    },
    # Wu et al., NeurIPS 2020: AT_AWP; epochs, milestones and 0.005 as RobustLT has them on
    # long-tailed data.
    "awp": {**_CE, "epochs": 200, "milestones": (100, 150), "objective": "ce", "awp": 0.005},
    # This project: AT-BSL with averaged weights and AutoAugment, at its cost. Examples of one step,
    # then five, pay for four times the epochs; where the learning rate falls, and networks overfit,
    # weights are perturbed. docs/recipes.md has the tables, docs/experiments.md what did not help.
    "reat-plus": {
        **_AT_BSL,
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

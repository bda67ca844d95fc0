"""AutoAttack by pyautoattack, which ours is held against: only the model in it is ours."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from reat_fast.attack import Norm
from reat_fast.cli.extras import import_extra
from reat_fast.evaluation.autoattack import MOST_TARGETS
from reat_fast.evaluation.victim import attacked


def package_autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    seed: int,
    batch_size: int,
    norm: Norm = "linf",
) -> Tensor:
    """Return which images [N, C, H, W] stand against pyautoattack's standard version, bool [N].

    Errors: ValueError with the pip line where the package is missing; FloatingPointError for logits
    that are NaN or infinite.
    """
    name = "aa-package" if norm == "linf" else "l2aa-package"
    pyautoattack = import_extra("pyautoattack", f"--attacks {name}", "eval")
    attack = pyautoattack.AutoAttack(
        model,
        device=images.device,
        eps=eps,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        seed=seed,
        version="standard",
    )
    with torch.no_grad():
        targets = min(MOST_TARGETS, model(images[:1]).shape[1] - 1)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
    trace = sys.gettrace()  # the package ends tracing, and with it debuggers and coverage
    devices = [images.device] if images.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # it seeds the global generators
            # It views images as rows of pixels, which channels_last memory does not allow.
            adv, _ = attack.run_standard_evaluation(
                images.contiguous(), labels, batch_size=batch_size
            )
    finally:
        sys.settrace(trace)
    with attacked(model) as victim:
        fooled = [
            victim.fooled(*batch)
            for batch in zip(adv.split(batch_size), labels.split(batch_size), strict=True)
        ]
        victim.refuse_nonfinite()
    return ~torch.cat(fooled)

"""RandAugment and the CIFAR-10 policy of AutoAugment, for a whole batch on its device.

What a sample draws depends only on (seed, epoch, sample index), see `kernels.policy`; what is then
done to it is `kernels.augment`. Both are torchvision's transforms v2 on Pillow images: the same
operations with the same probabilities, and from the same draw the same pixels, to the bit.

A policy is a list of subpolicies; a round draws one of them, each as likely, and does its steps in
turn, each with its own probability and, where it has one, sign. RandAugment is many rounds of a
list of single steps, AutoAugment one round of a list of pairs.

Sources: Cubuk et al., AutoAugment (CVPR 2019) and RandAugment (NeurIPS 2020); torchvision
transforms/v2/_auto_augment.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from reat_fast.kernels.augment import BLENDS, LOOKUPS, OPERATIONS, Numbers, numbers
from reat_fast.kernels.policy import Choices, run_policy
from reat_fast.kernels.prepare import check_batch, device_counter
from reat_fast.kernels.triton_support import Backend

PolicyName = Literal["randaugment", "autoaugment"]
Step = tuple[str, float, int]  # operation, probability, place in its magnitudes

BINS = 31
"""Magnitudes of RandAugment, 0 to 30."""

# Operations without magnitudes have place 0.
AUTOAUGMENT: tuple[tuple[Step, ...], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)


class Policy(NamedTuple):
    """Subpolicies, the number of magnitudes their places are in, and how many are drawn."""

    subpolicies: tuple[tuple[Step, ...], ...]
    bins: int
    rounds: int


def apply_policy(
    images: Tensor,
    indices: Tensor,
    seed: int | Tensor,
    epoch: int | Tensor,
    name: PolicyName,
    *,
    num_ops: int = 2,
    magnitude: int = 9,
    gather: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Augment a batch by a policy, before it is cropped and flipped; never syncs once warm.

    images: uint8 [N, H, W, C], contiguous, C = 1 or 3: the whole set, of which row indices[b] is
    sample b, or with gather=False the batch [B, H, W, C] itself. indices: int64 [B] on the same
    device, the samples' identity for the random numbers. seed, epoch: int or 0-dim int64 tensor.
    num_ops, magnitude: of RandAugment. The first call for a size of images copies small tables to
    the device, as it may in the warm-up of a capture, not in the capture.
    Returns uint8 [B, H, W, C], contiguous: prepare takes it with gather=False. Raises ValueError
    for a wrong dtype, shape, device, name or number. Source of the order, and of RandAugment(2, 8):
    official AT-BSL train_at_bsl_cifar10.py.
    """
    check_batch(images, indices, gather)
    if images.shape[3] not in (1, 3):
        raise ValueError(f"images have {images.shape[3]} channels: a policy takes C = 1 or 3")
    policy = _policy(name, num_ops, magnitude)
    return run_policy(
        images,
        indices.contiguous(),
        device_counter(seed, indices, "seed"),
        device_counter(epoch, indices, "epoch"),
        _choices(policy, images.shape[1], images.shape[2], images.device),
        gather=gather,
        backend=backend,
    )


def _policy(name: str, num_ops: int, magnitude: int) -> Policy:
    if name not in get_args(PolicyName):
        raise ValueError(f"policy {name!r} is unknown: give {' or '.join(get_args(PolicyName))}")
    if name == "autoaugment":
        return Policy(AUTOAUGMENT, 10, 1)
    if num_ops < 1 or not 0 <= magnitude < BINS:
        raise ValueError(
            f"RandAugment has num_ops={num_ops} and magnitude={magnitude}: give at least 1 "
            f"operation and a magnitude in 0..{BINS - 1}"
        )
    steps = ((operation, 1.0, magnitude) for operation in OPERATIONS if operation != "Invert")
    return Policy(tuple((step,) for step in steps), BINS, num_ops)


# Without a bound: a graph goes on reading the memory of a table, whichever others came after it.
@functools.cache
def _choices(policy: Policy, height: int, width: int, device: torch.device) -> Choices:
    limits, rows = [0], [numbers("Identity", 0.0, height, width)]
    for name, probability, place in (step for steps in policy.subpolicies for step in steps):
        value = _magnitude(name, place, policy.bins, height, width)
        signs = (1, 1) if name in LOOKUPS else (-1, 1)
        limits += [round(probability * 2**32)] * len(signs)
        rows += [numbers(name, sign * value, height, width) for sign in signs]

    def column(values: Sequence[object], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    operation, matrix, lookup, factor = zip(*rows, strict=True)
    levels, factors = column(lookup, torch.float32), column(factor, torch.float32)
    return Choices(
        column(limits),
        Numbers(column(operation), column(matrix), levels, factors),
        subpolicies=len(policy.subpolicies),
        steps=len(policy.subpolicies[0]),
        rounds=policy.rounds,
    )


def _magnitude(name: str, place: int, bins: int, height: int, width: int) -> float:
    def spaced(first: float, last: float) -> float:
        # torchvision's float32 numbers: a threshold of 187.000004 is not one of 187.
        return float(torch.linspace(first, last, bins, device="cpu").tolist()[place])

    match name:
        case "ShearX" | "ShearY":
            return spaced(0, 0.3)
        case "TranslateX" | "TranslateY":
            return spaced(0, 150 / 331 * (width if name == "TranslateX" else height))
        case "Rotate":
            return spaced(0, 30)
        case "Posterize":
            return 8 - round(4 * place / (bins - 1))
        case "Solarize":
            return 255 * spaced(1, 0)
        case _:
            return spaced(0, 0.9) if name in BLENDS else 0.0

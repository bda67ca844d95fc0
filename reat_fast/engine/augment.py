"""RandAugment and the CIFAR-10 policy of AutoAugment, for a whole batch on its device.

What a sample draws depends only on (seed, epoch, sample index), see `kernels.philox`; what is then
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

from reat_fast.kernels import philox
from reat_fast.kernels.augment import BLENDS, LOOKUPS, OPERATIONS, Numbers, numbers, operate
from reat_fast.kernels.prepare import check_batch

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
) -> Tensor:
    """Augment a batch by a policy, before it is cropped and flipped; never syncs once warm.

    images: uint8 [N, H, W, C] with C = 1 or 3, the whole set, of which row indices[b] is sample b,
    or with gather=False the batch [B, H, W, C] itself. indices: int64 [B] on the same device, the
    samples' identity for the random numbers. seed, epoch: int or 0-dim int64 tensor. num_ops,
    magnitude: of RandAugment. The first call for a size of images copies small tables to the
    device, as it may in the warm-up of a capture, not in the capture.
    Returns uint8 [B, H, W, C], contiguous: prepare takes it with gather=False. Raises ValueError
    for a wrong dtype, shape, device, name or number. Source of the order, and of RandAugment(2, 8):
    official AT-BSL train_at_bsl_cifar10.py.
    """
    check_batch(images, indices, gather)
    if images.shape[3] not in (1, 3):
        raise ValueError(f"images have {images.shape[3]} channels: a policy takes C = 1 or 3")
    policy = _policy(name, num_ops, magnitude)
    limits, rows = _table(policy, images.shape[1], images.shape[2], images.device)
    batch = images[indices] if gather else images
    pixels = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for row in _drawn(policy, limits, seed, epoch, indices).unbind(1):
        pixels = operate(pixels, Numbers(*(column[row] for column in rows)))
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


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
def _table(policy: Policy, height: int, width: int, device: torch.device) -> tuple[Tensor, Numbers]:
    """Return what can be drawn: nothing in row 0, then a row per subpolicy, step and sign.

    limits, int64 [R]: a row is done where a word is below; and its numbers.
    """
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
    return column(limits), Numbers(column(operation), column(matrix), levels, factors)


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


def _drawn(
    policy: Policy, limits: Tensor, seed: int | Tensor, epoch: int | Tensor, indices: Tensor
) -> Tensor:
    """Draw rows of the table [B, rounds * steps]: per round a subpolicy, signs and chances."""
    steps = len(policy.subpolicies[0])
    shape = policy.rounds, 1 + 2 * steps
    words = philox.random_bits(seed, epoch, indices, philox.POLICY, shape[0] * shape[1])
    subpolicy, sign, chance = words.unflatten(1, shape).split((1, steps, steps), dim=2)
    step = philox.integers(subpolicy, len(policy.subpolicies)) * steps
    step = step + torch.arange(steps, device=indices.device)  # [B, rounds, steps]
    row = 1 + 2 * step + philox.integers(sign, 2)
    return torch.where(chance < limits[row], row, 0).flatten(1)

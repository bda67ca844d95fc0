"""A policy of augmentations, run on stored bytes: each sample draws what is done to it.

A round draws one of the subpolicies, and for each of its steps a sign and whether it is done: a row
of the table, row 0 where it is not. Words are those of (seed, epoch, sample index), see `philox`;
what a row does is `augment.operate`.

The kernel is launched once a step, so that each reads what the one before has written whole: a
program draws for one image, and does its operation alone. Equal to the PyTorch form to the bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reat_fast.kernels import philox
from reat_fast.kernels.augment import Numbers, operate
from reat_fast.kernels.augment_triton import operate_on_image
from reat_fast.kernels.philox import philox_words
from reat_fast.kernels.triton_support import Backend, jit, tl, use_triton

BLOCK = 1024  # pixels of an image that a program has in hand at once


class Choices(NamedTuple):
    """What images of one size can draw: nothing, then a row per subpolicy, step and sign."""

    limits: Tensor  # int64 [R], a row is done where a word is below
    rows: Numbers
    subpolicies: int
    steps: int  # of each subpolicy
    rounds: int


def drawn(choices: Choices, seed: int | Tensor, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Draw rows [B, rounds * steps]; words of a round: subpolicy, signs, chances."""
    steps = choices.steps
    shape = choices.rounds, 1 + 2 * steps
    words = philox.random_bits(seed, epoch, indices, philox.POLICY, shape[0] * shape[1])
    subpolicy, sign, chance = words.unflatten(1, shape).split((1, steps, steps), dim=2)
    step = philox.integers(subpolicy, choices.subpolicies) * steps
    step = step + torch.arange(steps, device=indices.device)  # [B, rounds, steps]
    row = 1 + 2 * step + philox.integers(sign, 2)
    return torch.where(chance < choices.limits[row], row, 0).flatten(1)


def run_policy_torch(
    images: Tensor, indices: Tensor, seed: Tensor, epoch: Tensor, choices: Choices, gather: bool
) -> Tensor:
    """Run it in PyTorch: what the kernel is held against, and the CPU path."""
    batch = images[indices] if gather else images
    pixels = batch.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    for row in drawn(choices, seed, epoch, indices).unbind(1):
        pixels = operate(pixels, Numbers(*(column[row] for column in choices.rows)))
    return pixels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@jit
def _policy_kernel(  # type: ignore[no-untyped-def]
    images_ptr,
    indices_ptr,
    seed_ptr,
    epoch_ptr,
    limits_ptr,
    operation_ptr,
    matrix_ptr,
    lookup_ptr,
    factor_ptr,
    augmented_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    GATHER: tl.constexpr,
    SUBPOLICIES: tl.constexpr,
    STEPS: tl.constexpr,
    STEP: tl.constexpr,
    WORD: tl.constexpr,
    POLICY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SIZE: tl.constexpr = HEIGHT * WIDTH * CHANNELS
    batch = tl.program_id(0).to(tl.int64)
    sample = tl.load(indices_ptr + batch)
    seed = tl.load(seed_ptr)
    epoch = tl.load(epoch_ptr)
    subpolicy = tl.umulhi(_word(seed, epoch, sample, WORD, POLICY), SUBPOLICIES).to(tl.int32)
    sign = (_word(seed, epoch, sample, WORD + 1 + STEP, POLICY) >> 31).to(tl.int32)
    chance = _word(seed, epoch, sample, WORD + 1 + STEPS + STEP, POLICY).to(tl.int64)
    row = 1 + 2 * (subpolicy * STEPS + STEP) + sign
    row = tl.where(chance < tl.load(limits_ptr + row), row, 0)

    image = images_ptr + (sample if GATHER else batch) * SIZE
    augmented = augmented_ptr + batch * SIZE
    operate_on_image(
        image,
        augmented,
        tl.load(operation_ptr + row),
        matrix_ptr + row * 6,
        lookup_ptr + row * 256,
        factor_ptr + row,
        HEIGHT,
        WIDTH,
        CHANNELS,
        BLOCK,
    )


@jit
def _word(seed, epoch, sample, PLACE: tl.constexpr, POLICY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Draw the word at a place in what `random_bits` draws for a sample."""
    words = philox_words(seed, epoch, sample, tl.full([], PLACE // 4, tl.int32), POLICY)
    return words[PLACE % 4]


def run_policy(
    images: Tensor,
    indices: Tensor,
    seed: Tensor,
    epoch: Tensor,
    choices: Choices,
    *,
    gather: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """Draw for each sample and do what it drew, step by step; never syncs.

    images: uint8, contiguous, C = 1 or 3: the set [N, H, W, C], of which row indices[b] is sample
    b, or with gather=False the batch [B, H, W, C]. indices: int64 [B], contiguous; seed, epoch:
    0-dim int64; all on one device, as choices. Indices are not checked against N by the kernel.
    Returns uint8 [B, H, W, C], contiguous, other memory than images.
    """
    if not use_triton(backend, images) or not len(indices):
        return run_policy_torch(images, indices, seed, epoch, choices, gather)
    height, width, channels = images.shape[1:]
    for place in range(choices.rounds * choices.steps):
        round_, step = divmod(place, choices.steps)
        shape = (len(indices), height, width, channels)
        augmented = torch.empty(shape, dtype=torch.uint8, device=images.device)
        _policy_kernel[(len(indices),)](
            images,
            indices,
            seed,
            epoch,
            choices.limits,
            *choices.rows,
            augmented,
            HEIGHT=height,
            WIDTH=width,
            CHANNELS=channels,
            GATHER=gather and place == 0,
            SUBPOLICIES=choices.subpolicies,
            STEPS=choices.steps,
            STEP=step,
            WORD=round_ * (1 + 2 * choices.steps),
            POLICY=philox.POLICY,
            BLOCK=BLOCK,
        )
        images = augmented
    return images

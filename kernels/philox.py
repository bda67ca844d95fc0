"""Philox-4x32-10: counter-based random numbers, the same bits in PyTorch and in Triton.

Every random number of training is a function of (seed, epoch, sample index, purpose) and of nothing
else: the key is the seed, the counter is (block, sample, epoch, purpose), and each counter gives
four 32-bit words. So the numbers do not depend on the loader, the batch size, the number of
processes, the backend or the point of resumption. No function here waits for the device: seed and
epoch may be 0-dim int64 device tensors, as the replay of a CUDA graph needs.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reat_fast.kernels.triton_support import jit, tl

# The last counter word: numbers drawn for one purpose never meet those of another.
AUGMENT = 0
START = 1
ORDER = 2
SAMPLER = 3
EVALUATION = 4
POLICY = 5

WORDS = 4  # words per counter
SMALL = 2**14  # words on a CPU that take less time than starting the operations on tensors
_MASK = 0xFFFFFFFF


def random_bits(
    seed: int | Tensor, epoch: int | Tensor, samples: Tensor, purpose: int, count: int
) -> Tensor:
    """Draw `count` 32-bit words for each sample.

    samples: int64 [B], sample indices below 2**32. seed, epoch: int or 0-dim int64 tensor on the
    device of samples; the low 64 bits of seed and the low 32 bits of epoch count.
    Returns int64 [B, count] of values in [0, 2**32); a larger count continues a smaller one.
    """
    blocks = torch.arange(-(-count // WORDS), device=samples.device)
    if type(samples) is Tensor and samples.device.type == "cpu" and len(samples) * count <= SMALL:
        # The same arithmetic on arrays, which start an operation sooner than tensors do.
        blocks, samples, seed, epoch = (_array(v) for v in (blocks, samples, seed, epoch))
    counter = (blocks[None, :], (samples & _MASK)[:, None], epoch & _MASK, purpose & _MASK)
    words = philox(counter, (seed & _MASK, seed >> 32 & _MASK))  # 4 x [B, blocks]
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def philox(
    counter: tuple[int | Tensor, int | Tensor, int | Tensor, int | Tensor],
    key: tuple[int | Tensor, int | Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply the ten rounds of Philox-4x32 to counters and keys of 32-bit values held in int64.

    Returns four int64 tensors of the broadcast shape; at least one counter word is a tensor.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high2, low2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ (k0 ^ c1), low2, high0 ^ (k1 ^ c3), low0
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    words = torch.broadcast_tensors(*(torch.as_tensor(word) for word in (c0, c1, c2, c3)))
    return words[0], words[1], words[2], words[3]


def uniform(bits: Tensor) -> Tensor:
    """Turn words into float32 numbers in [0, 1): the top 24 bits, exactly."""
    return (bits >> 8).to(torch.float32) * 2.0**-24


def bernoulli(bits: Tensor, probability: float) -> Tensor:
    """Turn words into booleans that are True with this probability (to 2**-32)."""
    return bits < round(probability * 2**32)


def integers(bits: Tensor, high: int) -> Tensor:
    """Turn words into int64 numbers in [0, high), high < 2**31.

    Multiply and shift: probabilities are off by less than 2**-32 each, which no training can show.
    """
    return bits * high >> 32


def normal(bits: Tensor) -> Tensor:
    """Turn words [..., even] into standard normal float32 numbers of the same shape.

    Box-Muller: each pair of neighbouring words gives a pair of numbers, at most 5.77 in size.
    """
    first, second = bits.unflatten(-1, (-1, 2)).unbind(-1)
    radius = torch.sqrt(-2 * torch.log(uniform(first) + 2.0**-24))
    angle = uniform(second) * (2 * math.pi)
    return torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1).flatten(-2)


def permutation(
    n: int, seed: int | Tensor, epoch: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a random order of range(n), int64 [n]: the same one on every device.

    The stable sorting of 63-bit keys, one per element.
    """
    words = random_bits(seed, epoch, torch.arange(n, device=device), ORDER, 2)
    return torch.argsort((words[:, 0] << 31) | (words[:, 1] >> 1), stable=True)


def _multiply(word: int | Tensor, factor: int) -> tuple[int | Tensor, int | Tensor]:
    # factor - 2**32 is above -2**31, so this product fits int64 where word * factor would not
    product = word * (factor - 2**32)
    return (product >> 32) + word, product & _MASK


def _array(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


@jit
def philox_words(seed, epoch, sample, block, PURPOSE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Draw the four words of each counter, uint32: the kernels' `random_bits`.

    One product of 64 bits where tl.philox takes one for the upper and one for the lower half.
    """
    key0, key1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    word0, word1 = block.to(tl.uint32), sample.to(tl.uint32)
    word2, word3 = epoch.to(tl.uint32), tl.full([], PURPOSE, tl.uint32)
    for _ in tl.static_range(10):
        product0 = word0.to(tl.uint64) * 0xD2511F53
        product2 = word2.to(tl.uint64) * 0xCD9E8D57
        word0 = (product2 >> 32).to(tl.uint32) ^ word1 ^ key0
        word2 = (product0 >> 32).to(tl.uint32) ^ word3 ^ key1
        word1, word3 = product2.to(tl.uint32), product0.to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return word0, word1, word2, word3


@jit
def uniform_word(word):  # type: ignore[no-untyped-def]
    """Turn words into float32 numbers in [0, 1), exactly as `uniform`."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08  # 2**-24


@jit
def signed_word(word):  # type: ignore[no-untyped-def]
    """Turn words into float32 numbers in [-1, 1), exactly as 2 * `uniform` - 1."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 1.1920928955078125e-07 - 1  # 2**-23


@jit
def normal_words(first, second):  # type: ignore[no-untyped-def]
    """Turn two words into two normal numbers, as `normal` up to the rounding of log, cos, sin."""
    radius = tl.sqrt(-2.0 * tl.log(uniform_word(first) + 5.9604644775390625e-08))
    angle = uniform_word(second) * 6.283185307179586
    return radius * tl.cos(angle), radius * tl.sin(angle)

"""Random numbers: the published words, and nothing but (seed, epoch, sample, purpose) in them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from reat_fast.kernels import philox
from reat_fast.kernels.triton_support import jit, tl

FULL = 0xFFFFFFFF
# The known answers that come with Random123, for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def signed(low: int, high: int) -> int:
    value = low + (high << 32)
    return value - 2**64 if value >= 2**63 else value


@jit
def words_kernel(  # type: ignore[no-untyped-def]
    seed_ptr, epoch_ptr, samples_ptr, out_ptr, FIRST, PURPOSE: tl.constexpr, BLOCKS: tl.constexpr
):
    sample = tl.load(samples_ptr + tl.program_id(0))
    block = FIRST + tl.arange(0, BLOCKS).to(tl.int64)
    word0, word1, word2, word3 = philox.philox_words(
        tl.load(seed_ptr), tl.load(epoch_ptr), sample, block, PURPOSE
    )
    out = out_ptr + (tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)) * 4
    tl.store(out, word0.to(tl.int64))
    tl.store(out + 1, word1.to(tl.int64))
    tl.store(out + 2, word2.to(tl.int64))
    tl.store(out + 3, word3.to(tl.int64))


def words_triton(
    seed: int, epoch: int, samples: Tensor, purpose: int, first: int, blocks: int
) -> Tensor:
    out = torch.empty((len(samples), blocks * 4), dtype=torch.int64, device=samples.device)
    kernel: Any = words_kernel
    scalars = (torch.tensor(value, device=samples.device) for value in (seed, epoch))
    kernel[(len(samples),)](*scalars, samples, out, first, PURPOSE=purpose, BLOCKS=blocks)
    return out


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
@pytest.mark.parametrize("key_is_tensor", [False, True])
def test_words_are_the_published_ones(
    counter: Any, key: Any, words: tuple[int, ...], key_is_tensor: bool
) -> None:
    first, *rest = counter
    if key_is_tensor:
        key = tuple(torch.tensor(word) for word in key)
    drawn = philox.philox((torch.tensor([first]), *rest), key)
    assert tuple(int(word) for word in drawn) == words


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_the_kernel_gives_the_published_words(
    counter: Any, key: Any, words: tuple[int, ...], device: str
) -> None:
    block, sample, epoch, purpose = counter
    samples = torch.tensor([sample], device=device)
    drawn = words_triton(signed(*key), epoch, samples, purpose, block, 1)
    assert tuple(drawn[0].tolist()) == words


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (-1, 3), (2**62 + 12345, 2**31), (5, -1)])
def test_the_kernel_draws_the_words_of_pytorch(seed: int, epoch: int, device: str) -> None:
    samples = torch.tensor([0, 1, 49_999, 2**31, 2**32 - 1], device=device)
    expected = philox.random_bits(seed, epoch, samples, philox.START, 32)
    assert torch.equal(words_triton(seed, epoch, samples, philox.START, 0, 8), expected)


@pytest.mark.parametrize("batch", [1, philox.SMALL])  # either arithmetic
def test_of_seed_and_epoch_the_low_bits_count(batch: int) -> None:
    samples = torch.arange(batch)
    base = philox.random_bits(-5, 3, samples, philox.START, 4)
    for seed, epoch in ((2**64 - 5, 3), (-5, 3 - 2**32), (-5, 3 + 2**32)):
        assert torch.equal(philox.random_bits(seed, epoch, samples, philox.START, 4), base)
    assert not torch.equal(philox.random_bits(-5 + 2**32, 3, samples, philox.START, 4), base)


def test_a_sample_draws_the_same_whatever_the_batch() -> None:
    samples = torch.tensor([7, 3, 12_000, 0, 7])
    together = philox.random_bits(5, 2, samples, philox.START, 10)
    for row, sample in zip(together, samples, strict=True):
        assert torch.equal(row, philox.random_bits(5, 2, sample[None], philox.START, 10)[0])
    assert torch.equal(together[0], together[4])


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 17])
def test_a_larger_count_continues_a_smaller_one(count: int) -> None:
    samples = torch.arange(3)
    drawn = philox.random_bits(1, 0, samples, philox.AUGMENT, count)
    assert drawn.shape == (3, count) and drawn.dtype == torch.int64
    assert torch.equal(drawn, philox.random_bits(1, 0, samples, philox.AUGMENT, 20)[:, :count])


@pytest.mark.parametrize("seed", [0, 17, -3, 2**63 - 1, 2**40 + 1])
def test_seed_and_epoch_may_be_tensors(seed: int) -> None:
    samples = torch.arange(4)
    expected = philox.random_bits(seed, 9, samples, philox.START, 8)
    as_tensors = philox.random_bits(torch.tensor(seed), torch.tensor(9), samples, philox.START, 8)
    assert torch.equal(as_tensors, expected)


def test_each_of_seed_epoch_sample_and_purpose_changes_every_word() -> None:
    base = (3, 5, 11, philox.START)
    others = [
        (4, 5, 11, philox.START),
        (3 + 2**32, 5, 11, philox.START),
        (3, 6, 11, philox.START),
        (3, 5, 12, philox.START),
        (3, 5, 11, philox.AUGMENT),
    ]
    drawn = [
        philox.random_bits(seed, epoch, torch.tensor([sample]), purpose, 64)
        for seed, epoch, sample, purpose in [base, *others]
    ]
    for other in drawn[1:]:
        assert (drawn[0] != other).all()


def test_purposes_are_distinct() -> None:
    purposes = [
        philox.AUGMENT,
        philox.START,
        philox.ORDER,
        philox.SAMPLER,
        philox.EVALUATION,
        philox.POLICY,
    ]
    assert len(set(purposes)) == len(purposes)


def test_nothing_waits_for_the_device(forbid_syncs: None) -> None:
    seed, epoch = torch.tensor(3), torch.tensor(4)
    bits = philox.random_bits(seed, epoch, torch.arange(4), philox.START, 6)
    philox.uniform(bits), philox.normal(bits), philox.integers(bits, 9)
    philox.bernoulli(bits, 0.5), philox.permutation(9, seed, epoch)


def test_uniform_is_exact_and_below_one() -> None:
    bits = torch.tensor([0, 255, 256, 2**31, FULL])
    numbers = philox.uniform(bits)
    assert numbers.dtype == torch.float32
    assert numbers.tolist() == [0.0, 0.0, 2.0**-24, 0.5, 1 - 2.0**-24]


def test_uniform_numbers_are_uniform_and_unrelated() -> None:
    count = 1 << 18
    numbers = philox.uniform(philox.random_bits(0, 0, torch.arange(4), philox.START, count))
    numbers = numbers.double()
    # Five standard errors of the mean, of a cell of the histogram and of a correlation.
    assert abs(numbers.mean() - 0.5) < 5 * math.sqrt(1 / 12 / numbers.numel())
    cells = torch.histc(numbers, 64, 0, 1)
    assert (cells - numbers.numel() / 64).abs().max() < 5 * math.sqrt(numbers.numel() / 64)
    rows = torch.cat((numbers, numbers[:1].roll(1, 1)))  # four samples, and one of them shifted
    correlations = torch.corrcoef(rows) - torch.eye(5)
    assert correlations.abs().max() < 5 / math.sqrt(count)


def test_integers_cover_their_range_evenly() -> None:
    bits = philox.random_bits(1, 0, torch.arange(1), philox.AUGMENT, 90_000)[0]
    counts = philox.integers(bits, 9).bincount()
    assert len(counts) == 9
    assert (counts - 10_000).abs().max() < 5 * math.sqrt(10_000)  # five standard errors
    assert philox.integers(torch.tensor([0, FULL]), 2**31 - 1).tolist() == [0, 2**31 - 2]


def test_bernoulli_has_its_probability() -> None:
    bits = philox.random_bits(2, 0, torch.arange(1), philox.AUGMENT, 100_000)[0]
    for probability in (0.1, 0.5):
        spread = 5 * math.sqrt(probability * (1 - probability) / 100_000)  # five standard errors
        assert abs(philox.bernoulli(bits, probability).double().mean() - probability) < spread
    extremes = torch.tensor([0, FULL])
    assert not philox.bernoulli(extremes, 0.0).any() and philox.bernoulli(extremes, 1.0).all()


def test_normal_numbers_are_normal() -> None:
    bits = philox.random_bits(3, 0, torch.arange(1), philox.START, 1 << 19)
    numbers = philox.normal(bits)[0].double()
    count = len(numbers)
    # Five standard errors of mean, variance (2 / n) and fourth moment (96 / n).
    assert abs(numbers.mean()) < 5 / math.sqrt(count)
    assert abs(numbers.square().mean() - 1) < 5 * math.sqrt(2 / count)
    assert abs(numbers.pow(4).mean() - 3) < 5 * math.sqrt(96 / count)
    for deviations in (0.5, 1.0, 2.0, 3.0):
        share = math.erfc(deviations / math.sqrt(2))
        beyond = (numbers.abs() > deviations).double().mean()
        assert abs(beyond - share) < 5 * math.sqrt(share * (1 - share) / count)
    pairs = numbers.view(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 5 / math.sqrt(len(pairs))


def test_normal_numbers_are_finite_at_the_extreme_words() -> None:
    bits = torch.tensor([[0, 0, 0, FULL], [FULL, 0, FULL, FULL]])
    assert philox.normal(bits).isfinite().all()
    assert philox.normal(bits)[0, 0] == pytest.approx(math.sqrt(48 * math.log(2)), rel=1e-6)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_holds_every_element_once(n: int) -> None:
    assert torch.equal(philox.permutation(n, 0, 0).sort().values, torch.arange(n))


def test_permutation_depends_on_seed_and_epoch_only() -> None:
    base = philox.permutation(100, 1, 2)
    assert torch.equal(base, philox.permutation(100, torch.tensor(1), torch.tensor(2)))
    assert not torch.equal(base, philox.permutation(100, 2, 2))
    assert not torch.equal(base, philox.permutation(100, 1, 3))


def test_permutation_goes_by_the_second_word_where_the_first_are_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = torch.tensor([[5, 8], [5, 2], [1, FULL], [5, 6]])
    monkeypatch.setattr(philox, "random_bits", lambda *arguments: words)
    assert philox.permutation(4, 0, 0).tolist() == [2, 1, 3, 0]


def test_permutation_stays_the_same_from_version_to_version() -> None:
    # An interrupted run goes on in the same order after an upgrade.
    assert philox.permutation(8, 0, 0).tolist() == [5, 7, 6, 2, 1, 0, 3, 4]


def test_permutation_puts_every_element_everywhere() -> None:
    orders = torch.stack([philox.permutation(4, 0, epoch) for epoch in range(1000)])
    for place in range(4):
        counts = orders[:, place].bincount(minlength=4)
        assert (counts - 250).abs().max() < 5 * math.sqrt(250)  # five standard errors


@pytest.mark.gpu
def test_every_device_draws_the_same() -> None:
    samples = torch.arange(64)
    on_gpu = philox.random_bits(5, 1, samples.cuda(), philox.START, 100)
    assert torch.equal(on_gpu.cpu(), philox.random_bits(5, 1, samples, philox.START, 100))
    assert torch.equal(philox.permutation(999, 5, 1, "cuda").cpu(), philox.permutation(999, 5, 1))

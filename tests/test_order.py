"""The order of an epoch: what it shows, how often, and which rank takes what."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reat_fast.kernels.philox import permutation
from reat_fast.loaders import order
from reat_fast.loaders.order import SAMPLERS, EpochOrder, class_probabilities

COUNTS = np.array([640, 0, 320, 40])  # long-tailed, with a class that has no image
LABELS: npt.NDArray[np.int64] = np.repeat(np.arange(4), COUNTS)[permutation(1000, 0, 0).numpy()]

# An image weighs one over the effective number of its class, 1 + beta + ... + beta**(n - 1).
EFFECTIVE = np.array([n / sum(0.999**i for i in range(n)) if n else 0.0 for n in COUNTS.tolist()])
SHARES = {
    "instance": COUNTS / 1000,
    "class-balanced": np.array([1, 0, 1, 1]) / 3,
    "square-root": np.array([8, 0, 32**0.5, 2]) / (10 + 32**0.5),
    "effective": EFFECTIVE / EFFECTIVE.sum(),
    "progressive": COUNTS / 2000 + np.array([1, 0, 1, 1]) / 6,  # half way
}


def gathered(order: EpochOrder, epoch: int, first: int = 0) -> list[list[int]]:
    return [rows.tolist() for rows in order.batches(epoch, first)]


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), epoch=st.integers(0, 3))
def test_by_instance_an_epoch_shows_every_image_once(
    count: int, batch_size: int, epoch: int
) -> None:
    order = EpochOrder(np.arange(count) % 3, batch_size, seed=5)
    assert torch.equal(order.indices(epoch), permutation(count, 5, epoch))
    batches = gathered(order, epoch)
    assert len(batches) == len(order) == -(-count // batch_size)
    assert sorted(sum(batches, [])) == list(range(count))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_order_depends_on_seed_and_epoch_alone(sampler: str) -> None:
    def indices(seed: int, epoch: int, batch_size: int = 7) -> list[int]:
        order = EpochOrder(LABELS, batch_size, sampler=sampler, seed=seed, epochs=5)
        shown = order.indices(epoch)
        assert shown.dtype == torch.int64 and shown.shape == (1000,)
        assert torch.equal(torch.cat(list(order.batches(epoch))), shown)
        return shown.tolist()

    assert indices(1, 2) == indices(1, 2) == indices(1, 2, batch_size=30)
    assert indices(1, 2) != indices(1, 3)
    assert indices(1, 2) != indices(2, 2)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_shows_each_class_with_its_probability(sampler: str) -> None:
    share = SHARES[sampler]
    # Sums of at most 640 float64 terms: 640 roundings of 1.1e-16 each.
    np.testing.assert_allclose(class_probabilities(COUNTS, sampler, 2, 5), share, rtol=1e-13)
    order = EpochOrder(LABELS, 1000, sampler=sampler, seed=3, epochs=5)
    # Epoch 2 of 5 is half way; 40 seeds make 40,000 draws.
    drawn = []
    for seed in range(40):
        order.seed = seed
        drawn.append(order.indices(2))
    shown = np.bincount(LABELS[torch.cat(drawn).numpy()], minlength=4)
    deviation = np.sqrt(40_000 * share * (1 - share))  # of a binomial
    assert (np.abs(shown - 40_000 * share) <= 5 * deviation).all(), shown
    if sampler == "instance":
        assert (shown == 40 * COUNTS).all()


def test_within_a_class_every_image_is_equally_likely() -> None:
    labels = np.arange(60) % 2
    order = EpochOrder(labels, 60, sampler="class-balanced")
    shown = torch.cat([order.indices(epoch) for epoch in range(400)])
    times = torch.bincount(shown, minlength=60).double()
    # Chi-squared with 59 degrees of freedom: mean 59, deviation sqrt(2 * 59) = 10.9; 5 of them.
    assert abs(((times - 400) ** 2 / 400).sum().item() - 59) < 5 * 10.9


def test_words_at_the_limits_of_classes_choose_the_class_that_begins_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half, last = 2**31, 2**32 - 1
    words = torch.tensor([[0, 0], [half - 1, last], [half, 0], [last, last]])
    monkeypatch.setattr(order, "random_bits", lambda *arguments: words)
    labels = torch.tensor([1, 1, 2, 2])  # class 0 has no images
    assert EpochOrder(labels, 2, sampler="class-balanced").indices(0).tolist() == [0, 1, 2, 3]


def test_progressive_goes_from_instance_to_class_balanced() -> None:
    def share(epoch: int, epochs: int) -> list[float]:
        return list(class_probabilities(COUNTS, "progressive", epoch, epochs))

    assert share(0, 5) == pytest.approx(SHARES["instance"])
    assert share(4, 5) == share(9, 5) == pytest.approx(SHARES["class-balanced"])
    assert share(0, 1) == pytest.approx(SHARES["instance"])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_one_image_is_shown_by_every_sampler(sampler: str) -> None:
    assert gathered(EpochOrder(np.array([2]), 4, sampler=sampler), 0) == [[0]]


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(5, 20),
    world=st.integers(1, 5),
    sampler=st.sampled_from(SAMPLERS),
)
def test_the_ranks_share_every_batch_evenly(
    count: int, batch_size: int, world: int, sampler: str
) -> None:
    labels = np.arange(count) % 3
    whole = gathered(EpochOrder(labels, batch_size, sampler=sampler), 1)
    orders = [
        EpochOrder(labels, batch_size, sampler=sampler, rank=rank, world=world)
        for rank in range(world)
    ]
    shares = [gathered(order, 1) for order in orders]
    assert {len(share) for share in shares} == {len(whole)}  # the same number of steps
    assert sum(order.share for order in orders) == batch_size
    for step, rows in enumerate(whole):
        assert sum((share[step] for share in shares), []) == rows
        sizes = [len(share[step]) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        if len(rows) == batch_size:
            assert sizes == [order.share for order in orders]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_epoch_goes_on_from_any_batch(sampler: str) -> None:
    order = EpochOrder(LABELS, 300, sampler=sampler)
    whole = gathered(order, 1)
    assert [gathered(order, 1, first) for first in range(5)] == [whole[n:] for n in range(5)]


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_short_last_batch_is_kept_unless_dropped(drop_last: bool, sizes: list[int]) -> None:
    order = EpochOrder(np.arange(10) % 3, 4, drop_last=drop_last)
    assert [len(rows) for rows in order.batches(0)] == sizes
    assert len(order) == len(sizes)


@pytest.mark.gpu
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_gpu_draws_the_same_order(sampler: str) -> None:
    order = EpochOrder(LABELS, 7, sampler=sampler, epochs=5)
    there = order.to(torch.device("cuda"))
    assert there.indices(2).is_cuda and torch.equal(there.indices(2).cpu(), order.indices(2))


def test_moving_an_order_leaves_the_first_where_it_was() -> None:
    order = EpochOrder(LABELS, 7)
    assert order.to(torch.device("meta")).device.type == "meta" and order.device.type == "cpu"


@pytest.mark.parametrize(
    ("count", "batch_size", "options", "message"),
    [
        (5, 2, {"sampler": "none"}, "--sampler 'none' is unknown: use one of instance"),
        (5, 2, {"rank": 2, "world": 2}, "rank 2 of 2 processes"),
        (0, 2, {}, "no images"),
        (
            5,
            2,
            {"world": 3},
            "--batch-size 2 is smaller than the number of processes that share it: give at least 3",
        ),
        (5, 0, {}, "--batch-size 0"),
        (5, 6, {"drop_last": True}, "--batch-size 6 with drop_last leaves nothing of 5 images"),
    ],
)
def test_what_cannot_be_ordered_is_refused_in_one_line(
    count: int, batch_size: int, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        EpochOrder(np.zeros(count, np.int64), batch_size, **options)  # type: ignore[arg-type]
    assert message in str(caught.value)

"""The public losses equal the reference, in value and gradient."""

from __future__ import annotations

from typing import Any

import official_values as official
import pytest
import torch

from reat_fast import objective, reference
from reat_fast.config import Config
from reat_fast.methods.objectives import Part, make_objective
from reat_fast.objective import (
    ClassStatistics,
    balanced_softmax_loss,
    rbl_loss,
    rbl_weights,
    tail_penalty,
)

CPU = torch.device("cpu")


def test_losses_equal_the_reference_in_float64() -> None:
    made = official.inputs()
    labels = made["labels"]
    weights = torch.rand(10, dtype=torch.float64) + 0.1
    pairs = [
        (
            lambda z: objective.balanced_softmax_loss(z, labels, official.COUNTS),
            lambda z: reference.balanced_softmax_loss(z, labels, official.COUNTS),
            "logits",
        ),
        (
            lambda z: objective.rbl_loss(z, labels, weights),
            lambda z: reference.rbl_loss(z, labels, weights),
            "logits",
        ),
    ]
    for form in ("official", "pairwise"):
        pairs.append(
            (
                lambda f, form=form: objective.tail_penalty(  # type: ignore[misc]
                    f, labels, torch.tensor(official.COUNTS), form=form
                ),
                lambda f, form=form: reference.tail_penalty(  # type: ignore[misc]
                    f, labels, official.COUNTS, form=form
                ),
                "features",
            )
        )
    for fast, plain, name in pairs:
        found, expected = (made[name].double().requires_grad_() for _ in range(2))
        values = fast(found), plain(expected)
        # float64 sums of a few hundred terms: 1e-12 leaves room for their order and no more.
        torch.testing.assert_close(values[0], values[1], rtol=1e-12, atol=0)
        for value in values:
            value.backward()
        assert expected.grad is not None
        scale = float(expected.grad.abs().max())
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-13 * scale)


@pytest.mark.parametrize("form", ["official", "pairwise"])
def test_the_tail_are_the_smallest_classes_whatever_their_numbers(form: Any) -> None:
    made = official.inputs()
    features, logits = made["features"].double(), made["logits"].double()
    mixed = torch.tensor([3, 9, 0, 7, 1, 5, 8, 2, 6, 4])  # the new number of each class
    counts = torch.tensor(official.COUNTS)[mixed.argsort()]
    labels = mixed[made["labels"]]
    expected = reference.tail_penalty(features, made["labels"], official.COUNTS, form=form)
    assert float(expected) != 0
    found = reference.tail_penalty(features, labels, counts.tolist(), form=form)
    assert float(found) == pytest.approx(float(expected), rel=1e-12)
    statistics = ClassStatistics(counts.tolist(), CPU, torch.float64)
    chosen = make_objective(None, statistics, Config(tail=form))
    part = Part(features, features, labels, len(labels), torch.tensor(0), torch.zeros_like(counts))
    _, terms = chosen.compute(lambda _: (features, logits), part)
    assert float(terms["tail"]) == pytest.approx(float(expected), rel=1e-12)


def test_the_official_values_are_reached_in_float32() -> None:
    made = official.inputs()
    counts = torch.tensor(official.COUNTS)
    found = objective.tail_penalty(made["features"], made["labels"], counts)
    assert float(found) == pytest.approx(official.TAIL, rel=1e-5)
    found = objective.balanced_softmax_loss(made["logits"], made["labels"], counts)
    assert float(found) == pytest.approx(official.BSL, rel=1e-6)
    weights = objective.rbl_weights(counts, torch.tensor(official.AE_COUNTS))
    found = objective.rbl_loss(made["logits"], made["labels"], weights)
    assert float(found) == pytest.approx(official.RBL, rel=1e-5)


def test_counts_below_one_are_taken_as_one() -> None:
    made = official.inputs()
    counts, clamped = [5, 0, *official.COUNTS[2:]], [5, 1, *official.COUNTS[2:]]
    losses = [
        objective.balanced_softmax_loss(made["logits"], made["labels"], c)
        for c in (counts, clamped)
    ]
    assert torch.equal(*losses)


def test_class_sizes_are_not_rounded_to_the_precision_of_the_logits() -> None:
    made = official.inputs()
    half = made["logits"].bfloat16()
    losses = [
        objective.balanced_softmax_loss(logits, made["labels"], official.COUNTS)
        for logits in (half, half.float())
    ]
    assert losses[0].dtype == torch.float32 and torch.equal(*losses)


def test_before_the_first_epoch_the_examples_are_counted_as_the_images() -> None:
    statistics = ClassStatistics(official.COUNTS, torch.device("cpu"))
    expected = torch.from_numpy(reference.rbl_weights(official.COUNTS, official.COUNTS))
    # float32 arithmetic of the reference: 1 - beta^n is about 0.63, its rounding 1e-7 of that.
    torch.testing.assert_close(statistics.weights, expected, rtol=1e-5, atol=0)


def test_counts_may_be_lists() -> None:
    counts, features = [9, 5, 2, 1], torch.rand(6, 8)
    labels, rows = torch.tensor([0, 3, 3, 2, 1, 0]), torch.tensor(counts)
    assert torch.equal(
        rbl_weights(counts, [4, 0, 1, 1]), rbl_weights(rows, torch.tensor([4, 0, 1, 1]))
    )
    assert torch.equal(tail_penalty(features, labels, counts), tail_penalty(features, labels, rows))
    logits = torch.rand(6, 4)
    found = balanced_softmax_loss(logits, labels, counts)
    assert torch.equal(found, balanced_softmax_loss(logits, labels, rows))


@pytest.mark.parametrize(
    "counts",
    [[0.5, 0.3, 0.2], torch.tensor([0.5, 0.3, 0.2]), [5, -1, 2], [5.0, float("nan"), 2.0]],
)
def test_shares_in_place_of_counts_are_refused(counts: Any) -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    for call in (
        lambda: balanced_softmax_loss(logits, labels, counts),
        lambda: rbl_weights(counts, [4, 4, 4]),
        lambda: tail_penalty(logits, labels, counts),
        lambda: ClassStatistics(counts, torch.device("cpu")),
    ):
        with pytest.raises(ValueError, match=r"^counts: .*give the number of training images"):
            call()


def test_counts_may_be_floats_and_weights_a_list() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = balanced_softmax_loss(logits, labels, [50, 5, 1])
    assert torch.equal(balanced_softmax_loss(logits, labels, torch.tensor([50.0, 5, 1])), expected)
    weights = [0.5, 1.0, 2.0]
    assert torch.equal(
        rbl_loss(logits, labels, weights), rbl_loss(logits, labels, torch.tensor(weights))
    )
    with pytest.raises(ValueError, match="counts: 2 of them; give one for each class"):
        balanced_softmax_loss(logits, labels, [50, 5])

"""The reference equals the official code, and its loops equal the formulas."""

from __future__ import annotations

import official_values as official
import pytest
import torch
import torch.nn.functional as F

from reat_fast import reference

# One float32 rounding of a loss near 4 is 2.4e-7; the official code and ours add up a few.
ROUNDING = {"rtol": 1e-6, "atol": 0.0}


def test_rbl_weights_are_the_official_ones_bit_for_bit() -> None:
    weights = reference.rbl_weights(official.COUNTS, official.AE_COUNTS)
    assert weights.tolist() == official.RBL_WEIGHTS


def test_a_class_without_images_weighs_as_one_with_one_image() -> None:
    given = reference.rbl_weights([9, 0, 3], [4, 2, 0])
    assert given.tolist() == reference.rbl_weights([9, 1, 3], [4, 2, 0]).tolist()
    assert given.tolist() == reference.rbl_weights([9, 1, 3], [4, 7, 0]).tolist()  # as one AE


def test_losses_are_the_official_ones() -> None:
    made = official.inputs()
    logits, labels = made["logits"], made["labels"]
    weights = torch.tensor(official.RBL_WEIGHTS)
    rbl = reference.rbl_loss(logits, labels, weights)
    bsl = reference.balanced_softmax_loss(logits, labels, official.COUNTS)
    tail = reference.tail_penalty(made["features"], labels, official.COUNTS)
    torch.testing.assert_close(rbl, torch.tensor(official.RBL), **ROUNDING)
    torch.testing.assert_close(bsl, torch.tensor(official.BSL), **ROUNDING)
    # The official tail was recorded as loss - bsl, so it carries the rounding of a loss of 6.5.
    torch.testing.assert_close(tail, torch.tensor(official.TAIL), rtol=1e-6, atol=1e-6)


def test_three_training_steps_are_the_official_ones() -> None:
    made, model = official.inputs(), official.TinyNetwork()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for k in range(3):
        outcome = reference.train_step(
            model,  # type: ignore[arg-type]
            optimizer,
            made["images"],
            made["labels"],
            counts=official.COUNTS,
            ae_counts=official.AE_COUNTS,
            start=made["noise"][k],
            eps=8 / 255,
            step_size=2 / 255,
            steps=10,
        )
        # Another CPU may sum a convolution in another order and flip the sign of a gradient that
        # is almost zero, which moves one pixel by 4/255: 1e-4 leaves room for that and no more.
        assert float(outcome["loss"]) == pytest.approx(official.STEP_LOSSES[k], rel=1e-4)
        logits = float(outcome["logits"].abs().sum())
        assert logits == pytest.approx(official.STEP_LOGIT_SUMS[k], rel=1e-4)
    assert float(model.conv.weight.detach().abs().sum()) == pytest.approx(
        official.CONV_SUM, rel=1e-4
    )
    assert float(model.fc.weight.detach().abs().sum()) == pytest.approx(official.FC_SUM, rel=1e-4)


def test_pairwise_tail_is_a_term_per_pair() -> None:
    features = torch.randn(5, 7, dtype=torch.float64)
    labels, counts = torch.tensor([3, 0, 3, 1, 0]), [8, 4, 2, 2]
    rarity = [(16 / n) ** 0.5 for n in counts]
    expected = 0.0
    for i in (0, 2):  # with 4 classes the tail is class 3
        p, log_p = F.softmax(features[i], 0), F.log_softmax(features[i], 0)
        for j in range(5):
            kl = float((p * (log_p - F.log_softmax(features[j], 0))).sum())
            sign = -1 if labels[i] == labels[j] else 1
            weight = rarity[int(labels[i])] + rarity[int(labels[j])]
            expected += sign * weight * kl / 5 / 2
    found = reference.tail_penalty(features, labels, counts, form="pairwise")
    torch.testing.assert_close(float(found), expected, rtol=1e-12, atol=0)


def test_classes_without_images_count_as_classes_of_one() -> None:
    features = torch.randn(5, 7, dtype=torch.float64)
    labels, counts = torch.tensor([3, 0, 3, 2, 0]), [8, 4, 0, 0]
    clamped = [8, 4, 1, 1]
    for form in ("official", "pairwise"):
        found, expected = (
            reference.tail_penalty(features, labels, n, form=form) for n in (counts, clamped)
        )
        assert torch.equal(found, expected)
    losses = [
        reference.balanced_softmax_loss(features[:, :4], labels, n) for n in (counts, clamped)
    ]
    assert torch.equal(*losses)


def test_tail_without_tail_classes_is_zero_and_an_unknown_form_is_refused() -> None:
    features = torch.randn(3, 4)
    assert float(reference.tail_penalty(features, torch.tensor([0, 1, 0]), [5, 4, 3, 2])) == 0
    with pytest.raises(ValueError, match="official or pairwise"):
        reference.tail_penalty(features, torch.tensor([3, 1, 0]), [5, 4, 3, 2], form="other")

"""Radii per class are those of the paper, and grow from nothing."""

from __future__ import annotations

import pytest
import torch

from reat_fast.data import longtail_counts
from reat_fast.methods import reference
from reat_fast.methods.radii import ClassRadii, class_radius_factors


def test_class_radii_are_those_of_the_paper_on_cifar10_of_ratio_50() -> None:
    counts = longtail_counts(5000, 10, 0.02)
    levels = 8 * class_radius_factors(counts, 0.3)
    # The paper gives two decimals.
    assert float(levels[0]) == pytest.approx(5.60, abs=0.005)
    assert float(levels[-1]) == pytest.approx(12.88, abs=0.005)
    sizes = torch.tensor(counts, dtype=torch.float64)
    assert float((levels * sizes).sum() / sizes.sum()) == pytest.approx(8, rel=1e-12)
    expected = reference.class_radii(counts, 8.0, 0.3)
    assert levels.tolist() == pytest.approx(expected, rel=1e-12)
    assert class_radius_factors(counts, 0.0).tolist() == [1.0] * 10


def test_class_radii_take_a_class_without_images_for_one_of_a_single_one() -> None:
    found, expected = (class_radius_factors([40, 24, least], 0.3) for least in (0, 1))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="same size"):
        class_radius_factors([1, 0, 1], 0.3)
    with pytest.raises(ValueError, match="same size"):
        class_radius_factors(torch.tensor([5, 5]), 0.3)  # type: ignore[arg-type]


def test_class_radii_grow_in_equal_steps_from_nothing() -> None:
    radii = ClassRadii([50, 5], 0.5, 4, torch.device("cpu"), torch.float64)
    labels = torch.tensor([0, 1, 1])
    final = class_radius_factors([50, 5], 0.5)[labels]
    for epoch, share in ((0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (9, 1.0)):
        torch.testing.assert_close(radii.factors(labels, torch.tensor(epoch)), share * final)
    at_once = ClassRadii([50, 5], 0.5, 0, torch.device("cpu"), torch.float64)
    assert torch.equal(at_once.factors(labels, torch.tensor(0)), final)

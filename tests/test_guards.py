"""Guards: what is refused, what is warned of, and that a sound model passes silently."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reat_fast.checkpoint import ModelSpec
from reat_fast.data import Dataset, ImageSet
from reat_fast.evaluation import guards
from reat_fast.evaluation.guards import GuardError


class Classifier(nn.Module):
    """A linear classifier of 2x2 images whose logits go through a function."""

    def __init__(self, then: Callable[[Tensor], Tensor] = lambda logits: logits) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(12, 4)
        self.then = then

    def forward(self, images: Tensor) -> Tensor:
        return self.then(self.fc(images.flatten(1)))


IMAGES = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3, 0])


def test_a_sound_model_passes() -> None:
    model = Classifier().eval()
    guards.refuse(model, IMAGES, LABELS)
    assert guards.warnings_for_model(model, IMAGES, LABELS) == []


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (IMAGES * 255, "pixels reach from"),
        ((IMAGES - 0.5) / 0.25, "normalise inside the model"),
        (IMAGES / 255, "divided by 255 twice"),
        (IMAGES * torch.nan, "pixels reach from"),
    ],
)
def test_images_outside_the_unit_range_are_refused(images: Tensor, named: str) -> None:
    with pytest.raises(GuardError, match=named):
        guards.refuse(Classifier().eval(), images, LABELS)


def test_a_module_in_train_mode_is_refused_by_name() -> None:
    model = nn.Sequential(Classifier(), nn.BatchNorm1d(4)).eval()
    model[1].train()
    with pytest.raises(GuardError, match=r"model: 1 is in train mode.*call model\.eval"):
        guards.refuse(model, IMAGES, LABELS)


@pytest.mark.parametrize(
    ("then", "named"),
    [
        (lambda logits: logits.softmax(1), "probabilities"),
        (lambda logits: logits / 0, "NaN or infinite"),
        (lambda logits: (logits, None), "gives a tuple; it has to give logits alone"),
        (lambda logits: logits[:, :3], "labels: reach from 0 to 3, the model has 3 classes"),
    ],
)
def test_outputs_that_are_no_logits_are_refused(
    then: Callable[[Tensor], Tensor], named: str
) -> None:
    with pytest.raises(GuardError, match=named):
        guards.refuse(Classifier(then).eval(), IMAGES, LABELS)


def test_positive_logits_are_no_probabilities() -> None:
    guards.refuse(Classifier(lambda logits: logits.abs()).eval(), IMAGES, LABELS)


def test_random_outputs_are_warned_of() -> None:
    model = Classifier(lambda logits: logits + 0.01 * torch.randn_like(logits)).eval()
    (warning,) = guards.warnings_for_model(model, IMAGES, LABELS)
    assert "other logits for the same images" in warning


def test_rounding_noise_is_not_a_random_defence() -> None:
    model = Classifier(lambda logits: logits * (1 + 1e-6 * torch.rand(1))).eval()
    assert guards.warnings_for_model(model, IMAGES, LABELS) == []


def test_vanished_gradients_are_counted() -> None:
    stepped = Classifier(lambda logits: logits + (logits.round() - logits).detach() * 0)
    assert guards.warnings_for_model(stepped.eval(), IMAGES, LABELS) == []
    cut = Classifier(lambda logits: logits.detach() + 0 * logits).eval()
    found = guards.warnings_for_model(cut, IMAGES, LABELS)
    assert len(found) == 2
    assert all("5 of 5 images have no gradient" in warning for warning in found)
    assert "margin" in found[0] and "cross-entropy" in found[1]


def test_saturated_cross_entropy_is_warned_of_apart_from_the_margin() -> None:
    model = Classifier(lambda logits: 1e6 * logits).eval()
    labels = model(IMAGES).argmax(1)  # confidently right: the softmax is exactly one-hot
    (warning,) = guards.warnings_for_model(model, IMAGES, labels)
    assert "5 of 5 images have no gradient of the cross-entropy" in warning


def test_the_mode_of_the_model_stays() -> None:
    model = Classifier()
    guards.warnings_for_model(model, IMAGES, LABELS)
    assert model.training


def test_figures_that_contradict_each_other_are_warned_of() -> None:
    after = {"clean": 80.0, "apgd-ce": 52.0, "apgd-t": 50.0, "fab-t": 50.0, "square": 49.7}
    (square,) = guards.warnings_for_figures({"aa": {"overall": 49.7, "after": after}})
    assert "Square lowered aa from 50.00 % to 49.70 %" in square
    (one_step,) = guards.warnings_for_figures(
        {"fgsm": {"overall": 40.0}, "pgd20": {"overall": 55.0}}
    )
    assert "pgd20 leaves 55.00 % and fgsm 40.00 %" in one_step


def test_sound_figures_pass() -> None:
    after = {"clean": 80.0, "apgd-ce": 52.0, "apgd-t": 50.0, "fab-t": 50.0, "square": 49.9}
    sound = {
        "clean": {"overall": 80.0},
        "fgsm": {"overall": 56.0},
        "pgd20": {"overall": 52.0},
        "aa": {"overall": 49.9, "after": after},
    }
    assert guards.warnings_for_figures(sound) == []


NAMES = ("apple", "bear", "cat")


@pytest.mark.parametrize("names", [("apple", "cat", "bear"), ("bear", "cat", "apple")])
def test_the_same_classes_in_another_order_are_refused(names: tuple[str, ...]) -> None:
    """Their labels would be those of other classes."""
    pixels = np.zeros((3, 4, 4, 3), np.uint8)
    images = ImageSet(pixels, np.arange(3))
    spec = ModelSpec("resnet8", 3, 3, None, None, NAMES)
    data = Dataset("folder", images, images, names)
    place = 0 if names[0] != "apple" else 1
    wanted = f"--data: class {place} of folder is {names[place]}, .* trained on {NAMES[place]};"
    with pytest.raises(GuardError, match=wanted):
        guards.refuse_other_data(data, spec, Path("best"), "--data")
    guards.refuse_other_data(Dataset("folder", images, images, NAMES), spec, Path("best"), "--data")


def test_other_names_and_unknown_sizes_of_classes_are_warned_of() -> None:
    assert guards.warnings_for_classes(NAMES, NAMES, [3, 2, 1]) == []
    assert guards.warnings_for_classes(NAMES, (), [3, 2, 1]) == []  # official weights have none
    numbered = ("0", "1", "2")  # as classes of an .npz file are
    for names, own in ((numbered, NAMES), (NAMES, numbered)):
        assert guards.warnings_for_classes(names, own, [3, 2, 1]) == []
    (other,) = guards.warnings_for_classes(("apple", "cat", "dog"), NAMES, [3, 2, 1])
    assert other.startswith("class 1 of this data is cat, the model was trained on bear")
    (sizes,) = guards.warnings_for_classes(NAMES, NAMES, None)
    assert "--train-counts" in sizes

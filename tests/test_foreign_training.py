"""Networks with code of their own are trained, attacked as they are where no copy is the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_foreign_networks import Plain, TakesLists, TakesTensors, form_on_a_gpu
from torch import Tensor, fx, nn

from reat_fast import pgd
from reat_fast.config import Config
from reat_fast.engine import step_attack
from reat_fast.evaluation.victim import attacked
from reat_fast.networks import likeness
from reat_fast.networks.copies import copy_of
from reat_fast.step import TrainStep, make_optimizer


def make_step(model: nn.Module, **settings: Any) -> TrainStep:
    config = Config(steps=2, **settings)
    return TrainStep(model, make_optimizer(model, config), [9, 7, 5, 3], config)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(8, 3, 6, 6), torch.arange(8) % 4


class Shows(Plain):
    """A network that a step can train."""

    def forward_features_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.maps(images).mean((2, 3))
        return features, self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features_logits(images)[1]


class Keeps(Shows):
    """Keeps its features, as many networks do."""

    def forward_features_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.features, logits = super().forward_features_logits(images)
        return self.features, logits


def test_a_network_that_keeps_its_features_is_trained_averaged_and_attacked() -> None:
    model = Keeps()
    step = make_step(model, ema=0.9)
    images, labels = batch()
    step(images, labels)
    assert not model.features.is_leaf
    averaged = step.evaluated_network().eval()
    with attacked(averaged) as victim:
        assert torch.equal(victim(images), averaged(images))


class Hides(Shows):
    """Reads a convolution without its BatchNorm, but not where it is traced."""

    def maps(self, images: Tensor) -> Tensor:
        maps = super().maps(images)
        return maps if isinstance(images, fx.Proxy) else maps + self.conv1(images)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("kind", [Shows, Hides])
def test_a_step_attacks_the_network_itself_where_rewriting_it_changes_it(
    kind: type[Shows], precision: Any
) -> None:
    model = kind()
    step = make_step(model, precision=precision)
    original = copy_of(model).eval()
    images, labels = batch()
    start = torch.zeros_like(images)
    assert not step.unfolded
    adv = step(images, labels, start)["images_adv"]
    assert bool(step.unfolded) == (kind is Hides)
    assert step.attack.network is not None
    low = step.attack.network.images_dtype == torch.bfloat16
    assert low == (precision == "bf16")
    if precision == "float32":
        assert torch.equal(adv, pgd(original, images, labels, steps=2, start=start))


def test_a_network_is_looked_at_in_the_first_step_that_has_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, (images, labels) = make_step(Hides()), batch()
    none, counted = images[:0], torch.zeros((), dtype=torch.int64)
    step.attack.examples(
        none, labels[:0], none, parts=[slice(0, 0)], epoch=step.epoch, nonfinite=counted
    )
    assert not step.unfolded  # another process had them all
    step(images, labels)
    assert step.unfolded
    monkeypatch.setattr(step_attack, "keeps", None)
    step(images, labels)


def test_a_network_that_gives_more_than_logits_is_named_in_the_first_step() -> None:
    model = Shows()
    model.forward = model.forward_features_logits  # type: ignore[assignment, method-assign]
    step = make_step(model)
    with pytest.raises(ValueError, match="^model: gives a tuple; it has to give logits alone"):
        step(*batch())


class Moves(Shows):
    """Puts another tensor in the place of a statistic that it keeps."""

    seen: Tensor

    def maps(self, images: Tensor) -> Tensor:
        maps = super().maps(images)
        if self.training:
            self.seen = self.seen + 1
        return maps


class Adds(Shows):
    """Makes a statistic in its first step."""

    def maps(self, images: Tensor) -> Tensor:
        if self.training:
            self.register_buffer("seen", torch.ones(()))
        return super().maps(images)


@pytest.mark.parametrize("kind", [Moves, Adds])
def test_buffers_that_are_not_written_in_place_are_named(kind: type[Shows]) -> None:
    model = kind()
    if kind is Moves:
        model.register_buffer("seen", torch.zeros(()))
    step = make_step(model)
    with pytest.raises(
        ValueError, match=r"^model: (Moves|Adds) puts other .* \(seen\); write into"
    ):
        step(*batch())


def with_features(kind: type[Plain]) -> Any:
    """Make a network of a kind that a step can train."""
    return Shows() if kind is Plain else type(kind.__name__, (kind, Shows), {})()


@pytest.mark.parametrize("kind", [Plain, TakesTensors, TakesLists])
def test_what_a_gpu_attacks_in_16_bits_is_looked_at_at_the_first_step(
    kind: type[Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(likeness, "fastest_form", form_on_a_gpu)
    model = with_features(kind)
    step = make_step(model, precision="bf16")
    step(*batch())
    assert bool(step.unfolded) == (kind is not Plain)

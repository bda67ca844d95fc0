"""The cosine head: its logits, its weights, and where it finds its place."""

from __future__ import annotations

import pytest
import torch
from made_methods import (
    COUNTS,
    EXACT,
    make_images,
    make_network,
)
from torch import nn

from reat_fast.methods import reference
from reat_fast.methods.cosine_head import CosineHead, use_cosine_head
from reat_fast.models import create_model
from reat_fast.networks.architectures import TimmNetwork
from reat_fast.networks.frozen import FrozenNetwork


def test_the_cosine_head_gives_scaled_cosines_less_the_prior_and_gives_the_cosines_back() -> None:
    network = make_network("cosine")
    images, _ = make_images()
    logits = network(images)
    expected = reference.cosines(network, images)
    shares = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    torch.testing.assert_close(logits, 10 * expected - 0.1 * shares.log(), **EXACT)
    head = network.fc
    assert isinstance(head, CosineHead)
    torch.testing.assert_close(head.cosines(logits), expected, **EXACT)
    assert bool((expected.abs() < 1).all())


def test_the_cosine_head_takes_a_class_without_images_for_one_of_a_single_one() -> None:
    head = CosineHead(4, 3)
    head.compensate_([6, 3, 0], 0.5)
    torch.testing.assert_close(head.compensation, 0.5 * torch.tensor([0.6, 0.3, 0.1]).log())


def test_the_cosine_head_draws_its_weights_as_the_official_code() -> None:
    torch.manual_seed(2)
    weights = CosineHead(64, 100).weight.detach()
    # 6,400 draws from U(-1/8, 1/8): the largest is within 1/6,400 of the range of its end.
    assert float(weights.max()) == pytest.approx(0.125, rel=0.002)
    assert float(weights.min()) == pytest.approx(-0.125, rel=0.002)


def test_the_cosine_head_of_features_that_are_zero_is_finite() -> None:
    head = CosineHead(4, 3)
    features = torch.zeros(2, 4, requires_grad=True)
    head(features).sum().backward()
    assert features.grad is not None
    assert bool(features.grad.isfinite().all())


def test_a_network_with_the_cosine_head_is_saved_folded_and_moved_whole() -> None:
    network = make_network("cosine").eval()
    images, _ = make_images()
    fresh = create_model("resnet8", 5, width=8).double()
    use_cosine_head(fresh)
    fresh.load_state_dict(network.state_dict())
    assert torch.equal(fresh.eval()(images), network(images))
    frozen = FrozenNetwork(network)
    assert frozen.unfolded == []
    torch.testing.assert_close(frozen(images), network(images), **EXACT)


class Backbone(nn.Module):
    """What TimmNetwork needs of a timm model."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(12, 5)

    def get_classifier(self) -> nn.Linear:
        return self.head


def test_the_cosine_head_finds_its_place_in_a_timm_model() -> None:
    network = TimmNetwork(Backbone())
    head = use_cosine_head(network)
    assert network.fc is head
    assert head.weight.shape == (5, 12)
    assert {"backbone.head.weight", "backbone.head.scale"} <= network.state_dict().keys()

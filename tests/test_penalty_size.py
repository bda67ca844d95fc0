"""The size of the tail penalty beside balanced softmax is what the plain reference says."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from reat_fast import reference
from reat_fast.attack import pgd
from reat_fast.kernels.tail_penalty import Form
from reat_fast.methods.penalty_size import tail_gradient_share
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.objective import ClassStatistics

COUNTS = [20, 9, 6, 4, 2]


def made() -> tuple[Network, Tensor, Tensor]:
    torch.manual_seed(0)
    network = create_model("resnet8", 5, width=8).double()
    images = torch.rand(6, 3, 16, 16, dtype=torch.float64)
    return network, images, torch.tensor([0, 4, 1, 0, 2, 4])


@pytest.mark.parametrize("counts", [COUNTS, [4, 20, 2, 9, 6]], ids=["by size", "as they come"])
@pytest.mark.parametrize("form", ["official", "pairwise"])
def test_the_share_is_that_of_the_loop_reference(form: Form, counts: list[int]) -> None:
    network, images, labels = made()
    weights = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    statistics = ClassStatistics(counts, images.device)
    share = tail_gradient_share(
        network, images, labels, statistics, form=form, coefficient=0.5, batch_size=3, steps=2
    )
    assert network.training
    assert all(torch.equal(t, weights[name]) for name, t in network.state_dict().items())
    lengths = {"tail": 0.0, "softmax": 0.0}
    network.eval()
    for rows in (slice(3), slice(3, 6)):
        adv = pgd(network, images[rows], labels[rows], steps=2, start=torch.zeros(3, 3, 16, 16))
        features = network.forward_features(adv).detach().requires_grad_()
        tail = 0.5 * reference.tail_penalty(features, labels[rows], counts, form=form)
        loss = reference.balanced_softmax_loss(network.fc(features), labels[rows], counts)
        for name, value in (("tail", tail), ("softmax", loss)):
            lengths[name] += float(torch.autograd.grad(value, features)[0].norm())
    assert share == pytest.approx(lengths["tail"] / lengths["softmax"], rel=1e-6)
    assert 0 < share < math.inf


def test_images_of_head_classes_alone_have_no_penalty() -> None:
    network, images, labels = made()
    statistics = ClassStatistics(COUNTS, images.device)
    share = tail_gradient_share(network, images, labels * 0, statistics, steps=1)
    assert share == 0

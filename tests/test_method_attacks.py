"""Attacks of training and perturbed weights equal their references and keep to their plan."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from made_methods import (
    COUNTS,
    EPS,
    EXACT,
    STEP,
    make_images,
    make_network,
    make_noise,
    make_statistics,
)

from reat_fast.attack import ascend_
from reat_fast.methods import reference
from reat_fast.methods.attacks import (
    FreePerturbation,
    choose_attack_loss,
    plan_attack,
)
from reat_fast.methods.weight_perturbation import WeightPerturbation, statistics_kept
from reat_fast.networks.frozen import FrozenNetwork


def test_a_network_without_statistics_has_none_to_keep() -> None:
    network = torch.nn.Linear(2, 2)  # a transformer has none either
    with statistics_kept(network):  # type: ignore[arg-type]
        network(torch.zeros(1, 2))


def test_weights_move_by_gamma_of_their_norm_and_come_back() -> None:
    network = make_network()
    network.register_parameter("places", torch.nn.Parameter(torch.ones(1, 4).double()))
    network.places.grad = torch.ones(1, 4).double()  # type: ignore[union-attr]
    images, labels = make_images()
    before = copy.deepcopy(network.state_dict())
    with statistics_kept(network):
        F.cross_entropy(network(images), labels).backward()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(KeyboardInterrupt), WeightPerturbation(network, 0.01).perturbed():
        for name, weight in network.named_parameters():
            moved = float((weight.detach() - before[name]).norm())
            share = 0.01 if weight.ndim > 1 and name != "places" else 0.0
            assert moved == pytest.approx(share * float(before[name].norm()), rel=1e-9), name
        raise KeyboardInterrupt
    for name, tensor in network.state_dict().items():
        # Added and subtracted: one rounding of 1.1e-16.
        torch.testing.assert_close(tensor, before[name], rtol=1e-15, atol=1e-16)


@pytest.mark.parametrize("gradient", ["zero", "none"])
def test_a_weight_without_a_gradient_is_not_perturbed(gradient: str) -> None:
    network = make_network()
    images, labels = make_images()
    F.cross_entropy(network(images), labels).backward()
    assert network.fc.weight.grad is not None
    network.fc.weight.grad = None if gradient == "none" else network.fc.weight.grad.zero_()
    before = network.fc.weight.detach().clone()
    with WeightPerturbation(network, 0.01).perturbed():
        assert torch.equal(network.fc.weight, before)


def test_a_weight_that_one_step_uses_and_the_next_does_not_stays_in_the_next() -> None:
    # As in a network of one's own that leaves out layers at random.
    network = make_network()
    images, labels = make_images()
    perturbation = WeightPerturbation(network, 0.5)
    F.cross_entropy(network(images), labels).backward()
    with perturbation.perturbed():
        pass
    network.fc.weight.grad = None
    before = network.fc.weight.detach().clone()
    with perturbation.perturbed():
        pass
    assert torch.equal(network.fc.weight, before)


@pytest.mark.parametrize(("name", "step", "radius"), [("fgsm-rs", 1.25, 1.0), ("n-fgsm", 1.0, 9.0)])
def test_one_step_attacks_equal_their_reference(name: Any, step: float, radius: float) -> None:
    network = make_network()
    clean, labels = make_images()
    plan = plan_attack(name, eps=EPS, step_size=STEP, steps=10)
    noise = make_noise(clean, plan.noise_scale)
    start = plan.settle_(clean + noise)
    adv = ascend_(
        FrozenNetwork(network),
        start,
        clean,
        labels,
        eps=plan.radius,
        step_size=plan.step_size,
        steps=plan.steps,
        loss=choose_attack_loss("ce", network, make_statistics(), partial(network, clean)),
    )
    expected = reference.one_step_attack(
        network, clean, labels, noise, step=step * EPS, radius=radius * EPS
    )
    torch.testing.assert_close(adv, expected, **EXACT)
    farthest = float((adv - clean).abs().max())
    assert farthest > 2 * EPS if name == "n-fgsm" else farthest <= EPS + 1e-12


def test_an_attack_maximises_the_loss_of_its_name_summed_over_the_images() -> None:
    statistics = make_statistics()
    statistics.next_ae_counts += torch.tensor([30, 1, 20, 0, 9])
    statistics.end_epoch()
    made = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, generator=made, dtype=torch.float64), torch.arange(6) % 5
    weights = statistics.weights
    summed = partial(F.cross_entropy, target=labels, reduction="sum")
    expected = {
        "ce": summed(logits),
        "bsl": summed(logits + torch.tensor(COUNTS, dtype=torch.float64).log()),
        "rbl": summed(logits, weight=weights.double()),
        "rbl_offsets": summed(logits + weights.log().double()),
    }
    for name, value in expected.items():
        loss = choose_attack_loss(name, make_network(), statistics, lambda: logits)  # type: ignore[arg-type]
        torch.testing.assert_close(loss(logits, labels), value, rtol=1e-13, atol=0)


def test_starts_have_the_noise_of_their_plan() -> None:
    images = torch.full((64, 3, 8, 8), 0.5)
    torch.manual_seed(1)
    for start, spread in (("uniform", EPS / math.sqrt(3)), ("normal", 0.001), ("none", 0.0)):
        plan = plan_attack("pgd", eps=EPS, step_size=STEP, steps=1, start=start)  # type: ignore[arg-type]
        begin = plan.draw_start(images)
        assert begin.data_ptr() != images.data_ptr()  # an attack works in place
        noise = begin - images
        # 12,288 draws: the deviation of a standard deviation is about 1/157 of it.
        assert float(noise.std()) == pytest.approx(spread, rel=0.04)
        # As in the official code, PGD's first gradient is taken outside of [0, 1] too.
        dark = plan.draw_start(torch.zeros(8, 1, 8, 8))
        assert bool((dark < 0).any()) == (start != "none")
    wide = plan_attack("n-fgsm", eps=EPS, step_size=STEP, steps=1).draw_start(
        torch.zeros(8, 1, 8, 8)
    )
    assert float(wide.min()) == 0.0
    assert EPS < float(wide.max()) <= 2 * EPS


def test_free_training_equals_its_reference_and_survives_a_stop() -> None:
    networks = [make_network() for _ in range(2)]
    optimizers = [torch.optim.SGD(n.parameters(), 0.05, 0.9) for n in networks]
    images, labels = make_images()
    free = FreePerturbation((10, 3, 8, 8), EPS, images.device, torch.float64)
    perturbation = torch.zeros_like(images)
    for size in (10, 7):  # the second batch is a short one
        rows, targets = images[:size].roll(size, 2), labels[:size]
        for _ in range(3):
            attacked = free.attacked(rows)
            optimizers[0].zero_grad()
            F.cross_entropy(networks[0](attacked), targets).backward()
            free.update_(attacked, rows)
            optimizers[0].step()
        perturbation[:size] = reference.free_steps(
            networks[1], optimizers[1], rows, targets, perturbation[:size], eps=EPS, replays=3
        )
        torch.testing.assert_close(free.state_dict()["free_perturbation"], perturbation, **EXACT)
    for name, tensor in networks[0].state_dict().items():
        # Six updates with momentum pass the difference of the gradients on.
        torch.testing.assert_close(tensor, networks[1].state_dict()[name], rtol=1e-9, atol=1e-9)
    other = FreePerturbation((10, 3, 8, 8), EPS, images.device, torch.float64)
    other.load_state_dict(free.state_dict())
    assert torch.equal(other.attacked(images), free.attacked(images))

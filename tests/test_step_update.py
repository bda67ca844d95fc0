"""The update of a step: its optimiser, its constants, perturbed and averaged weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from made_step import COUNTS, make_batch, make_model, make_noise, uint8_batch

from reat_fast.config import Config
from reat_fast.methods.objectives import Part, make_objective
from reat_fast.objective import ClassStatistics
from reat_fast.step import TrainStep, make_optimizer


@pytest.mark.parametrize(
    "numbers",
    [
        {"lr": 0.25, "momentum": 0.75, "weight_decay": 0.0625},
        {"lr": 0.25, "momentum": 0.75, "nesterov": True, "weight_decay": 0.0},
        {"lr": 0.5, "momentum": 0.0},
    ],
)
def test_the_optimizer_is_sgd_with_the_numbers_of_the_configuration(
    numbers: dict[str, Any],
) -> None:
    model = make_model(torch.float64)
    plain = copy.deepcopy(model)
    ours = make_optimizer(model, Config(**numbers))
    theirs = torch.optim.SGD(plain.parameters(), **{"weight_decay": 5e-4, **numbers})
    for step in range(3):
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            a.grad = torch.full_like(a, 0.5 - step) + a.detach()
            b.grad = a.grad.clone()
        ours.step()
        theirs.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        # A dozen roundings of float64, of numbers below 4.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


CONSTANTS: list[tuple[Any, dict[str, Any]]] = [
    ("bsl", {"tail": "pairwise", "tail_coefficient": 0.25}),
    ("bsl", {"label_smoothing": 0.25}),
    ("trades", {"beta": 2.0}),
    ("robal", {"margin": 0.5}),
    ("robal", {"margin_tau": 1.0}),
    ("robal", {"prior_tau": 0.5}),
    ("taet", {"second_stage": 0}),
]


@pytest.mark.parametrize(("objective", "constants"), CONSTANTS)
def test_the_constants_of_an_objective_are_those_of_the_configuration(
    objective: Any, constants: dict[str, Any]
) -> None:
    head = "cosine" if objective == "robal" else "linear"
    settings: dict[str, Any] = {"tail": "none", **constants}
    config = Config(objective=objective, head=head, steps=0, **settings)  # type: ignore[arg-type]
    images, labels = make_batch(torch.float64)
    model = make_model(torch.float64, head=head)
    plain = copy.deepcopy(model)
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    outcome = step(images, labels, make_noise(images, 0))
    statistics = ClassStatistics(COUNTS, torch.device("cpu"), torch.float64)
    bound = make_objective(plain, statistics, config)
    zero, histogram = torch.tensor(0), torch.zeros(5, dtype=torch.int64)
    part = Part(images, outcome["images_adv"], labels, len(labels), zero, histogram)
    _, terms = bound.compute(plain.train().forward_features_logits, part)
    for name, value in terms.items():
        torch.testing.assert_close(outcome[name], value.detach(), rtol=1e-12, atol=1e-12)
    assert step.running_means()["loss"] == pytest.approx(float(outcome["loss"]), rel=1e-14)


def test_weights_are_perturbed_from_an_epoch_on() -> None:
    """Before it the step is the plain one, from it on that of --awp alone, loaded or not."""
    configs = (Config(), Config(awp=0.01, awp_from=1), Config(awp=0.01))
    images, labels = make_batch()
    made = [(make_model(), config) for config in configs]
    steps = [TrainStep(m, make_optimizer(m, c), COUNTS, c) for m, c in made]
    plain, late, perturbed = steps
    assert [step.update.perturbs for step in steps] == [False, False, True]
    for step in steps:
        step(images, labels, make_noise(images, 0))
    for a, b, c in zip(*(step.model.parameters() for step in steps), strict=True):
        assert torch.equal(a, b) and (a.ndim == 1 or not torch.equal(a, c))
    late.end_epoch()
    for step in (plain, perturbed):  # of the same weights, momentum and epoch as late
        step.model.load_state_dict(late.model.state_dict())
        step.optimizer.load_state_dict(copy.deepcopy(late.optimizer.state_dict()))
        step.load_state_dict(copy.deepcopy(late.state_dict()))
    assert [step.update.perturbs for step in steps] == [False, True, True]
    for step in steps:
        step(images, labels, make_noise(images, 1))
    for a, b, c in zip(*(step.model.parameters() for step in steps), strict=True):
        assert torch.equal(b, c) and (a.ndim == 1 or not torch.equal(a, b))
    again = TrainStep(model := make_model(), make_optimizer(model, configs[1]), COUNTS, configs[1])
    again.load_state_dict(late.state_dict())
    assert again.update.perturbs


def test_averaged_weights_follow_the_formula_and_are_what_is_evaluated() -> None:
    config = Config(ema=0.7, steps=0, lr=0.1)
    model = make_model()
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    expected = {name: tensor.clone().double() for name, tensor in model.state_dict().items()}
    for k in range(1, 31):
        step.train_on(uint8_batch())
        share = max(9 / (9 + k), 1 - 0.7)
        for name, tensor in model.state_dict().items():
            expected[name] += share * (tensor.double() - expected[name])
    found = step.evaluated_network().state_dict()
    for name in ("stem.conv.weight", "stem.bn.running_var", "fc.bias"):
        # Thirty float32 updates, each rounded by 2^-24 and forgotten by three tenths.
        torch.testing.assert_close(found[name].double(), expected[name], rtol=1e-6, atol=1e-7)
        assert not torch.equal(found[name], model.state_dict()[name])


def test_a_clipped_gradient_has_the_norm_asked_for() -> None:
    config = Config(clip_norm=0.01, steps=0, momentum=0.0, weight_decay=0.0, lr=1.0)
    model = make_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    step.train_on(uint8_batch())
    moved = [a - b.detach() for a, b in zip(before, model.parameters(), strict=True)]
    norm = torch.stack([tensor.norm() for tensor in moved]).norm()
    # The norm is of differences of float32 weights near 0.1, each rounded by 7e-9.
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_is_that_of_pytorch() -> None:
    images, labels = make_batch()
    config = Config(label_smoothing=0.1, steps=0, tail="none")
    model = make_model()
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    outcome = step(images, labels, make_noise(images, 0))
    shifted = outcome["logits"] + torch.tensor(COUNTS).float().log()
    expected = torch.nn.functional.cross_entropy(shifted, labels, label_smoothing=0.1)
    torch.testing.assert_close(outcome["loss"], expected)

"""The fused step: it equals the reference, never asks the host, and keeps the right statistics."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import official_values as official
import pytest
import torch
from no_sync import NoSync
from torch import Tensor

from reat_fast import reference
from reat_fast.config import PRESETS, Config, parse
from reat_fast.engine import step_update
from reat_fast.engine.augment import apply_policy
from reat_fast.engine.distributed import World
from reat_fast.engine.reference_step import ReferenceStep
from reat_fast.engine.step_attack import resolve_attack_loss
from reat_fast.engine.step_update import resolve_update_form
from reat_fast.kernels import own_conv
from reat_fast.kernels.prepare import prepare
from reat_fast.loaders import Batch
from reat_fast.methods import reference as methods
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.methods.objectives import Part, make_objective
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.objective import ClassStatistics
from reat_fast.step import TrainStep, make_optimizer

COUNTS = [40, 24, 12, 7, 4]


def make_batch(dtype: torch.dtype = torch.float32, size: int = 12) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    images = torch.rand(size, 3, 8, 8, generator=made, dtype=dtype)
    labels = torch.randint(0, 5, (size,), generator=made)
    labels[:2] = 4
    return images, labels


def make_noise(images: Tensor, step: int) -> Tensor:
    made = torch.Generator().manual_seed(100 + step)
    return (torch.rand(images.shape, generator=made, dtype=images.dtype) * 2 - 1) * 8 / 255


def make_model(
    dtype: torch.dtype = torch.float32, name: str = "resnet8", head: str = "linear"
) -> Network:
    torch.manual_seed(0)
    network = create_model(name, 5, width=8)
    if head == "cosine":
        use_cosine_head(network).compensate_(COUNTS, 0.1)
    return network.to(dtype)


def run_both(dtype: torch.dtype, steps: int, tail: Any = "official") -> list[dict[str, Tensor]]:
    """Take steps with the fused step and the reference; return the last outcomes and models."""
    images, labels = make_batch(dtype)
    config = Config(tail=tail, lr=0.125)
    results = []
    for fused in (True, False):
        model = make_model(dtype)
        if fused:
            step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        else:
            plain = torch.optim.SGD(model.parameters(), 0.125, momentum=0.9, weight_decay=5e-4)
        for k in range(steps):
            start = make_noise(images, k)
            if fused:
                outcome = step(images, labels, start)
            else:
                outcome = reference.train_step(
                    model,
                    plain,
                    images,
                    labels,
                    counts=COUNTS,
                    ae_counts=COUNTS,
                    start=start,
                    eps=config.eps,
                    step_size=config.step_size,
                    steps=config.steps,
                    tail=tail,
                )
        results.append({**outcome, **dict(model.state_dict())})
    return results


@pytest.mark.parametrize("tail", ["official", "pairwise", "none"])
def test_five_steps_equal_five_reference_steps_in_float64(tail: str) -> None:
    fused, plain = run_both(torch.float64, steps=5, tail=tail)
    # Folding BatchNorm reorders sums of a few hundred float64 terms; eps is 2.2e-16, and ten
    # updates with momentum pass differences on without enlarging them much.
    for name, expected in plain.items():
        torch.testing.assert_close(fused[name], expected, rtol=1e-9, atol=1e-11, msg=name)


def test_five_steps_equal_five_reference_steps_in_float32() -> None:
    fused, plain = run_both(torch.float32, steps=5)
    same = (fused["images_adv"] - plain["images_adv"]).abs() < 1e-6
    assert float(same.double().mean()) >= 0.9999
    for name in ("stem.conv.weight", "fc.weight"):
        scale = float(plain[name].abs().max())
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-4, atol=1e-4 * scale)


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
    bound = make_objective(objective, plain, statistics, **settings)
    zero, histogram = torch.tensor(0), torch.zeros(5, dtype=torch.int64)
    part = Part(images, outcome["images_adv"], labels, len(labels), zero, histogram)
    _, terms = bound.compute(plain.train().forward_features_logits, part)
    for name, value in terms.items():
        torch.testing.assert_close(outcome[name], value.detach(), rtol=1e-12, atol=1e-12)
    assert step.running_means()["loss"] == pytest.approx(float(outcome["loss"]), rel=1e-14)


def test_rbl_is_attacked_where_it_acts_unless_another_loss_is_named() -> None:
    found = [
        resolve_attack_loss(Config(attack_batchnorm=mode, attack_loss=loss))  # type: ignore[arg-type]
        for mode in ("eval", "train")
        for loss in ("auto", "rbl", "ce")
    ]
    assert found == ["ce", "rbl", "ce", "rbl", "rbl", "ce"]


def uint8_batch(gather: bool = True) -> Batch:
    made = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (30, 8, 8, 3), generator=made, dtype=torch.uint8)
    labels = torch.arange(30) % 5
    rows = torch.tensor([3, 29, 4, 14, 9, 0, 7, 1])
    return Batch(images if gather else images[rows], labels[rows], rows, gather=gather)


VARIANTS: list[dict[str, Any]] = [
    {"attack_loss": "rbl"},
    {"attack_loss": "rbl_offsets"},
    {"attack_batchnorm": "train"},
    {"tail": "pairwise"},
    {"tail": "none"},
    {"precision": "bf16"},
    {"ema": 0.99, "clip_norm": 1.0, "label_smoothing": 0.1},
    {"precision": "bf16", "attack_batchnorm": "train"},
    {"attack": "fgsm-rs"},
    {"attack": "n-fgsm", "accumulate": 3},
    {"attack": "free", "replays": 2},
]
CONFIGS = {
    **PRESETS,
    **{
        "-".join(map(str, changes.values())): dataclasses.replace(PRESETS["reat"], **changes)
        for changes in VARIANTS
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_never_makes_the_host_wait(name: str) -> None:
    config = dataclasses.replace(CONFIGS[name], steps=2)
    model = make_model(head=config.head)
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    batch = uint8_batch()
    step.train_on(batch)
    with NoSync():
        step.train_on(batch)


def test_the_guard_against_waiting_works() -> None:
    mask = torch.tensor([True, False, True])
    wrong: list[Callable[[], object]] = [
        lambda: torch.ones(2).sum().item(),
        lambda: bool(torch.ones(()) > 0),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.ones(3)[mask],
        lambda: torch.ones(3).unique(),
        lambda: torch.ones(3).index_put_((mask,), torch.ones(2)),
    ]
    for call in wrong:
        with pytest.raises(AssertionError), NoSync():
            call()
    with NoSync():
        torch.ones(3)[mask] = 0.0


def test_the_magnitude_of_a_policy_acts() -> None:
    examples = []
    for magnitude in (0, 30, 30):
        model = make_model()
        config = Config(policy="randaugment", policy_magnitude=magnitude, steps=1)
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        examples.append(step.train_on(uint8_batch())["images_adv"])
    none, most, again = examples
    assert torch.equal(most, again)
    assert float((most - none).abs().max()) > 2 * Config().eps


def test_gathered_and_copied_batches_give_the_same_step() -> None:
    outcomes = []
    for gather in (True, False):
        model = make_model()
        step = TrainStep(model, make_optimizer(model, Config()), COUNTS, Config(steps=2))
        outcomes.append(step.train_on(uint8_batch(gather)))
    assert torch.equal(outcomes[0]["images_adv"], outcomes[1]["images_adv"])


def test_the_epoch_changes_augmentation_and_noise() -> None:
    model = make_model()
    step = TrainStep(model, make_optimizer(model, Config()), COUNTS, Config(steps=0, lr=0.0))
    first = step.train_on(uint8_batch())["images_adv"]
    again = step.train_on(uint8_batch())["images_adv"]
    step.end_epoch()
    later = step.train_on(uint8_batch())["images_adv"]
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_statistics_are_those_of_the_official_loop() -> None:
    model = make_model()
    config = Config(steps=1)
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    images, labels = make_batch()
    predicted, correct, losses = [0] * 5, 0, []
    for k in range(3):
        outcome = step(images, labels, make_noise(images, k))
        for prediction, label in zip(outcome["logits"].argmax(1), labels, strict=True):
            predicted[int(prediction)] += 1
            correct += int(prediction == label)
        losses.append(float(outcome["loss"]))
    assert step.statistics.ae_counts.tolist() == COUNTS
    means = step.end_epoch()
    assert step.statistics.ae_counts.tolist() == predicted
    assert step.statistics.next_ae_counts.tolist() == [0] * 5
    assert means["loss"] == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert means["adv_accuracy"] == pytest.approx(100 * correct / 36)
    assert means["nonfinite"] == 0
    expected = torch.from_numpy(reference.rbl_weights(COUNTS, predicted))
    # The official arithmetic is float32: 1 - beta^a keeps 6e-8 of an a/n that is at least 1/40.
    torch.testing.assert_close(step.statistics.weights, expected, rtol=1e-5, atol=1e-7)
    assert int(step.epoch) == 1


@pytest.mark.parametrize(
    "changes", [{}, {"awp": 0.005}, {"accumulate": 3}, {"objective": "trades", "tail": "none"}]
)
def test_each_example_is_counted_once_by_its_prediction(changes: dict[str, Any]) -> None:
    config = Config(steps=1, **changes)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    images, labels = make_batch()
    step(images, labels, make_noise(images, 0))
    assert int(step.statistics.next_ae_counts.sum()) == len(labels)


@pytest.mark.parametrize("attack", ["pgd", "free"])
def test_an_epoch_begins_with_nothing_summed(attack: Any) -> None:
    config = Config(attack=attack, replays=2)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    images, labels = make_batch()
    step(images * math.nan, labels, make_noise(images, 0))
    first = step.end_epoch()
    assert math.isnan(first["loss"]) and first["nonfinite"] > 0 and int(step.epoch) == 1
    assert not any(step.running_means().values()) and int(step.bad_step) == -1
    assert step.end_epoch()["nonfinite"] == 0


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


def test_a_form_of_gpus_is_refused_on_a_cpu() -> None:
    config = Config(attack_form="cudnn")
    with pytest.raises(ValueError, match="--attack-form cudnn: needs a CUDA device; leave it out"):
        TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)


@pytest.mark.parametrize("changes", [{}, {"radius": "class", "radius_warmup": 0.0}])
def test_examples_are_of_one_step_up_to_an_epoch(changes: dict[str, Any]) -> None:
    """Before it the step is that of n-fgsm, from it on that of --attack, loaded or not."""
    fields = {"steps": 3, "start": "normal", **changes}
    configs = [Config(attack="n-fgsm", **fields), Config(attack_from=1, **fields), Config(**fields)]
    made = [(make_model(), config) for config in configs]
    steps = [TrainStep(m, make_optimizer(m, c), COUNTS, c) for m, c in made]
    fast, late, slow = steps
    assert late.kind == fast.kind != slow.kind
    first = [step.train_on(uint8_batch())["images_adv"] for step in steps]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    late.end_epoch()
    for step in (fast, slow):  # of the same weights, momentum and epoch as late
        step.model.load_state_dict(late.model.state_dict())
        step.optimizer.load_state_dict(copy.deepcopy(late.optimizer.state_dict()))
        step.load_state_dict(copy.deepcopy(late.state_dict()))
    assert fast.kind != late.kind == slow.kind
    second = [step.train_on(uint8_batch())["images_adv"] for step in steps]
    assert torch.equal(second[1], second[2]) and not torch.equal(second[0], second[1])
    for a, b in zip(late.model.parameters(), slow.model.parameters(), strict=True):
        assert torch.equal(a, b)
    again = TrainStep(model := make_model(), make_optimizer(model, configs[1]), COUNTS, configs[1])
    again.load_state_dict(late.state_dict())
    assert again.kind == late.kind


def test_the_reference_step_follows_the_fused_one() -> None:
    outcomes = []
    for make in (TrainStep, ReferenceStep):
        model = make_model()
        step = make(model, make_optimizer(model, Config()), COUNTS, Config())
        outcome = step.train_on(uint8_batch())
        outcomes.append({**outcome, "means": torch.tensor(list(step.end_epoch().values()))})
    for name in ("logits", "loss", "bsl", "tail", "means"):
        torch.testing.assert_close(outcomes[0][name], outcomes[1][name], rtol=1e-4, atol=1e-4)


def test_bfloat16_is_near_float32_and_keeps_float32_images_weights_and_losses() -> None:
    images, labels = make_batch(size=32)
    outcomes = []
    for precision in ("float32", "bf16"):
        config = Config(precision=precision, lr=0.125)  # type: ignore[arg-type]
        model = make_model()
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        outcome = step(images, labels, make_noise(images, 0))
        outcomes.append(outcome)
        for name in ("images_adv", "loss", "bsl", "tail"):
            assert outcome[name].dtype == torch.float32
        assert all(tensor.dtype != torch.bfloat16 for tensor in model.state_dict().values())
        moved = (outcome["images_adv"] - images).abs()
        assert float(moved.max()) <= 8 / 255 + 1.2e-7
    # A bfloat16 has 8 bits: a dozen roundings of 2^-9 each along the network, and another attack.
    torch.testing.assert_close(outcomes[1]["loss"], outcomes[0]["loss"], rtol=0.03, atol=0)
    assert not torch.equal(outcomes[1]["loss"], outcomes[0]["loss"])


def test_on_a_cpu_the_attack_alone_is_in_bfloat16_on_batch_statistics_too() -> None:
    config = Config(precision="bf16", attack_batchnorm="train", steps=1)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    seen: list[torch.dtype] = []
    model.fc.register_forward_hook(lambda _, features, logits: seen.append(logits.dtype))
    images, labels = make_batch()
    step(images, labels, make_noise(images, 0))
    assert seen == [torch.bfloat16, torch.float32]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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


def test_the_reference_step_refuses_what_it_cannot_do() -> None:
    model = make_model()
    refused: list[dict[str, Any]] = [
        {"attack_batchnorm": "train"},
        {"attack_loss": "rbl_offsets"},
        {"tail_coefficient": 0.5},
        {"clip_norm": 1.0},
        {"ema": 0.9},
    ]
    for changes in refused:
        config = dataclasses.replace(Config(), **changes)
        with pytest.raises(ValueError, match="--no-fused"):
            ReferenceStep(model, make_optimizer(model, config), COUNTS, config)


def test_state_survives_a_round_trip() -> None:
    config = Config(steps=1)
    model = make_model()
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    step.train_on(uint8_batch())
    step.end_epoch()
    step.train_on(uint8_batch())
    saved = copy.deepcopy(step.state_dict())
    other = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    other.load_state_dict(saved)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, saved[name]), name
    assert torch.equal(other.statistics.weights, step.statistics.weights)


def test_rbl_offsets_push_examples_towards_classes_that_are_rarely_predicted() -> None:
    images, labels = make_batch(size=64)
    model = make_model().eval()
    shares = []
    for loss in ("ce", "rbl_offsets"):
        config = Config(attack_loss=loss, lr=0.0)  # type: ignore[arg-type]
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        step.statistics.next_ae_counts.copy_(torch.tensor([64, 64, 64, 64, 0]))
        step.statistics.end_epoch()
        adv = step(images, labels, make_noise(images, 0))["images_adv"]
        model.eval()
        shares.append(float(model(adv).detach().softmax(1)[:, 4].mean()))
    assert shares[1] > shares[0]


def test_official_values_are_reached_by_the_fused_step() -> None:
    made, model = official.inputs(), official.TinyNetwork()
    config = Config()
    step = TrainStep(
        model,  # type: ignore[arg-type]
        make_optimizer(model, config),  # type: ignore[arg-type]
        official.COUNTS,
        config,
    )
    for k in range(3):
        outcome = step(made["images"], made["labels"], made["noise"][k])
        assert float(outcome["loss"]) == pytest.approx(official.STEP_LOSSES[k], rel=1e-4)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch.compile run what it traced, forward and backward, without generating code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


COMPILED: dict[str, dict[str, Any]] = {
    "reat": {},
    "accumulate": {"accumulate": 3},
    "awp": {"awp": 0.005},
    "free": {"attack": "free", "replays": 2},
    "trades": {"objective": "trades", "tail": "none"},
    "train-mode attack": {"attack_batchnorm": "train"},
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_update_is_the_eager_one_with_its_running_statistics(
    name: str, traced: None
) -> None:
    images, labels = make_batch(torch.float64)
    results = []
    for form in ("eager", "compiled"):
        config = dataclasses.replace(
            Config(lr=0.125, update_form=form, batch_size=12),  # type: ignore[arg-type]
            **COMPILED[name],
        )
        model = make_model(torch.float64)
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        for k in range(2):
            outcome = step(images, labels, make_noise(images, k))
        results.append({**outcome, **dict(model.state_dict())})
    assert "stem.bn.running_var" in results[0]
    for key, expected in results[0].items():
        # As above: sums of float64 in another order, through two updates.
        torch.testing.assert_close(results[1][key], expected, rtol=1e-9, atol=1e-11, msg=key)


def test_a_compiled_update_in_bfloat16_is_near_the_eager_one(traced: None) -> None:
    images, labels = make_batch(size=32)
    losses = []
    for form in ("eager", "compiled"):
        config = Config(update_form=form, precision="bf16", steps=1)  # type: ignore[arg-type]
        model = make_model()
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        losses.append(step(images, labels, make_noise(images, 0))["loss"])
        assert all(tensor.dtype != torch.bfloat16 for tensor in model.state_dict().values())
    # A bfloat16 has 8 bits; what is traced rounds where the operators do.
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Have code generated for several threads, whatever number the tests were started with."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs the C++ compiler g++")
def test_generated_code_updates_as_the_eager_form_does(two_threads: None) -> None:
    torch.compiler.reset()
    made, results = official.inputs(), []
    images, noise = made["images"].double(), made["noise"].double()
    for form in ("eager", "compiled"):
        model: Any = official.TinyNetwork().double()
        config = Config(update_form=form)  # type: ignore[arg-type]
        step = TrainStep(model, make_optimizer(model, config), official.COUNTS, config)
        for k in range(2):
            outcome = step(images, made["labels"], noise[k])
        results.append({**outcome, **dict(model.state_dict())})
    for key, expected in results[0].items():
        # As above.
        torch.testing.assert_close(results[1][key], expected, rtol=1e-9, atol=1e-11, msg=key)


class Breaking(official.TinyNetwork):
    """A network that no compiler takes as a whole."""

    def forward_features_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        torch._dynamo.graph_break()
        return super().forward_features_logits(images)


def test_a_compiled_update_that_cannot_be_is_refused_in_one_line(
    traced: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="--update-form compiled: the reference of --no-fused"):
        parse(["reat", "--no-fused", "--update-form", "compiled"], "reat")
    config, model = Config(update_form="compiled", steps=0), make_model()
    with pytest.raises(ValueError, match="--update-form compiled: works in one process"):
        monkeypatch.setattr(World, "take_from_main_", lambda self, tensors: None)
        TrainStep(model, make_optimizer(model, config), COUNTS, config, World(size=2))
    broken: Any = Breaking()
    step = TrainStep(broken, make_optimizer(broken, config), official.COUNTS, config)
    made = official.inputs()
    with pytest.raises(ValueError, match="--update-form compiled: this network cannot") as refused:
        step(made["images"], made["labels"], made["noise"][0])
    assert "\n" not in str(refused.value)


def test_a_fused_update_that_cannot_be_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(World, "take_from_main_", lambda self, tensors: None)
    with pytest.raises(ValueError, match="--update-form fused: the reference of --no-fused"):
        parse(["reat", "--no-fused", "--update-form", "fused"], "reat")
    config, model = Config(update_form="fused"), make_model()
    with pytest.raises(ValueError, match="--update-form fused: needs Triton and a CUDA device"):
        TrainStep(model, make_optimizer(model, config), COUNTS, config)
    with pytest.raises(ValueError, match="--update-form fused: .*; add --no-sync-batchnorm"):
        TrainStep(model, make_optimizer(model, config), COUNTS, config, World(size=2))


def test_the_update_is_fused_by_itself_where_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, alone = torch.device("cuda"), World()
    monkeypatch.setattr(own_conv, "why_not", lambda device: None)
    for capability, form in (((9, 0), "fused"), ((10, 0), "eager"), ((7, 5), "eager")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert resolve_update_form(Config(), cuda, alone) == form
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve_update_form(Config(), torch.device("cpu"), alone) == "eager"
    for precision in ("float32", "tf32"):
        assert resolve_update_form(Config(precision=precision), cuda, alone) == "eager"  # type: ignore[arg-type]
    assert resolve_update_form(Config(graph="off"), cuda, alone) == "eager"
    assert resolve_update_form(Config(fused=False), cuda, alone) == "eager"
    several = World(size=2)
    assert resolve_update_form(Config(), cuda, several) == "eager"
    assert resolve_update_form(Config(sync_batchnorm=False), cuda, several) == "fused"
    for named in ("eager", "compiled"):
        assert resolve_update_form(Config(update_form=named), cuda, alone) == named  # type: ignore[arg-type]


class OwnBatchNorm(torch.nn.BatchNorm2d):
    """A BatchNorm that is not PyTorch's own, which is left alone."""


def test_an_update_that_has_nothing_to_fuse_is_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_update, "_require_fused", lambda *given: None)
    config = Config(update_form="fused")
    for changed, form in ((False, "fused"), (True, "eager")):
        model = make_model()
        for module in model.modules():
            if changed and type(module) is torch.nn.BatchNorm2d:
                module.__class__ = OwnBatchNorm
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        assert step.update.form == form


@pytest.mark.interpreter
@pytest.mark.parametrize("changes", [{}, {"awp": 0.01}, {"accumulate": 2}, {"precision": "bf16"}])
def test_a_fused_update_is_near_the_eager_one_with_its_running_statistics(
    changes: dict[str, Any],
) -> None:
    images, labels = make_batch()
    results = []
    for form in ("eager", "fused"):
        config = Config(lr=0.125, update_form=form, steps=1, **changes)  # type: ignore[arg-type]
        model = make_model()
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        outcome = step(images, labels, make_noise(images, 0))
        results.append({"loss": outcome["loss"], **model.state_dict()})
    # A bfloat16 has 8 bits, and PyTorch rounds before the residual sum as well.
    low = changes.get("precision") == "bf16"
    torch.testing.assert_close(results[1]["loss"], results[0]["loss"], rtol=0.01, atol=0)
    for key, expected in results[0].items():
        assert results[1][key].dtype == expected.dtype
        if not low or "running" in key:  # sums in another order
            atol = (0.02 if low else 1e-4) * float(expected.abs().max())
            torch.testing.assert_close(results[1][key], expected, rtol=0, atol=atol, msg=key)


@pytest.mark.parametrize("flag", ["update_form", "attack_form"])
def test_a_missing_compiler_is_said_at_once(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    config = dataclasses.replace(Config(), **{flag: "compiled"})
    model = make_model()
    with pytest.raises(
        ValueError, match="form compiled: needs the C\\+\\+ compiler no-such-compil"
    ):
        TrainStep(model, make_optimizer(model, config), COUNTS, config)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
def test_a_step_augments_by_the_published_policy_before_anything_else(policy: Any) -> None:
    config = Config(policy=policy, steps=0, start="none", augment=False, seed=3)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    step.epoch.fill_(2)
    batch = uint8_batch()
    expected = apply_policy(
        batch.images, batch.indices, 3, 2, policy, num_ops=2, magnitude=8, gather=True
    )
    found = step.train_on(batch)["images_adv"]
    assert torch.equal(found, expected.permute(0, 3, 1, 2) / 255)


@pytest.mark.parametrize(("attack", "noise"), [("fgsm-rs", 1.0), ("n-fgsm", 2.0)])
def test_a_one_step_attack_of_radii_per_class_is_made_of_multiples_of_each(
    attack: str, noise: float
) -> None:
    step_size, radius = (1.25, 1.0) if attack == "fgsm-rs" else (1.0, math.inf)
    changes: dict[str, Any] = {"attack": attack, "radius": "class", "radius_alpha": 1.0}
    config = Config(**changes, augment=False, epochs=10, radius_warmup=0.8, precision="float32")
    radii = [r / 2 for r in methods.class_radii(COUNTS, config.eps, 1.0)]  # 4 of 8 epochs done
    step = TrainStep(
        model := make_model(torch.float64), make_optimizer(model, config), COUNTS, config
    )
    step.epoch.fill_(4)
    images, labels = make_batch(torch.float64)
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    found = step(images, labels)["images_adv"]
    torch.manual_seed(0)
    unit = torch.rand_like(images) * 2 - 1
    for b, label in enumerate(labels.tolist()):
        eps, row = radii[label], slice(b, b + 1)
        expected = methods.one_step_attack(
            plain,
            images[row],
            labels[row],
            noise * eps * unit[row],
            step=step_size * eps,
            radius=radius * eps if eps else 0.0,
        )
        # Sums of a few hundred float64 terms in another order, eps 2.2e-16, through eight layers.
        torch.testing.assert_close(found[row], expected, rtol=1e-10, atol=1e-10)
    # The same of noise drawn for a batch of a loader, in float32 (4e-8 of a pixel up to 1).
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    step.epoch.fill_(4)
    batch = uint8_batch()
    found = step.train_on(batch)["images_adv"]
    clean = batch.images[batch.indices].permute(0, 3, 1, 2) / 255
    farthest = (found - clean).abs().amax((1, 2, 3))
    for label, distance in zip(batch.labels.tolist(), farthest.tolist(), strict=True):
        assert distance <= min(noise + step_size, radius) * radii[label] + 1e-7


STARTS = [
    ("pgd", "uniform", "uniform", 1.0),
    ("pgd", "normal", "normal", 0.001 / Config().eps),
    ("pgd", "none", "none", 0.0),
    ("fgsm-rs", "uniform", "uniform", 1.0),
    ("n-fgsm", "uniform", "uniform", 2.0),
]


@pytest.mark.parametrize(("attack", "start", "noise", "scale"), STARTS)
def test_the_start_of_a_loaders_batch_is_that_of_the_attack(
    attack: Any, start: Any, noise: Any, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(attack=attack, start=start, steps=1, seed=3)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    step.epoch.fill_(2)
    begun = []

    def spy(images: Tensor, labels: Tensor, adv_start: Tensor, **rest: Any) -> Tensor:
        begun.append(adv_start.clone())
        return examples(images, labels, adv_start, **rest)

    examples = step.attack.examples
    monkeypatch.setattr(step.attack, "examples", spy)
    batch = uint8_batch()
    step.train_on(batch)
    _, expected = prepare(batch.images, batch.indices, 3, 2, scale * config.eps, noise=noise)
    # Only one-step attacks bring it into [0, 1] before the first gradient.
    assert torch.equal(begun[0], expected if attack == "pgd" else expected.clamp(0, 1))
    assert start == "none" or bool(((expected < 0) | (expected > 1)).any())


def test_pgd_of_radii_per_class_starts_in_the_common_one() -> None:
    config = Config(radius="class", augment=False, steps=1)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    step.epoch.fill_(40)
    assert step.attack.noise_scale(torch.arange(5), step.epoch) == config.eps


def test_the_parts_of_a_batch_are_attacked_with_radii_of_their_own() -> None:
    images, labels = make_batch(torch.float64)
    found = []
    for accumulate in (1, 3):
        config = Config(radius="class", radius_warmup=0.0, accumulate=accumulate, steps=2)
        step = TrainStep(
            model := make_model(torch.float64), make_optimizer(model, config), COUNTS, config
        )
        found.append(step(images, labels, make_noise(images, 0))["images_adv"])
    # Sums of a few hundred float64 terms in another order; a sign turns where one is zero.
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
    reach = (found[0] - images).abs().amax((1, 2, 3))
    assert float(reach[labels == 4].min()) > 1.5 * float(reach[labels == 0].max())


def test_free_training_goes_back_to_a_state_from_before_its_first_step() -> None:
    config = Config(attack="free", replays=2, lr=0.01, precision="float32", batch_size=8)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    assert step.plan.noise == "none"  # none is drawn for examples that are not made
    beginning = copy.deepcopy((model.state_dict(), step.optimizer.state_dict(), step.state_dict()))
    first = step.train_on(uint8_batch())
    for part, state in zip((model, step.optimizer, step), beginning, strict=True):
        part.load_state_dict(state)
    again = step.train_on(uint8_batch())
    assert torch.equal(again["images_adv"], first["images_adv"])
    assert torch.equal(again["logits"], first["logits"])


def test_a_step_trains_in_train_mode_whatever_the_mode_before() -> None:
    images, labels = make_batch()
    logits = []
    for training in (True, False):
        step = TrainStep(
            model := make_model(), make_optimizer(model, Config()), COUNTS, Config(steps=1)
        )
        model.train(training)
        logits.append(step(images, labels, make_noise(images, 0))["logits"])
        assert all(module.training for module in model.modules())
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            {"images": torch.zeros(8, 3, 8, 8, dtype=torch.uint8)},
            "images: torch.uint8; give torch.",
        ),
        ({"images": torch.rand(8, 3, 8, 8).double()}, "images: torch.float64; give torch.float32"),
        ({"labels": torch.arange(4)}, "labels: torch.int64 of shape [4]; give int64, a class for"),
        ({"labels": torch.zeros(8).int()}, "labels: torch.int32 of shape [8]; give int64"),
        ({"labels": torch.eye(8)[:, :5]}, "labels: torch.float32 of shape [8, 5]; give int64"),
        ({"labels": torch.eye(8)[:, :5].long()}, "labels: torch.int64 of shape [8, 5]; give int64"),
        ({"start": torch.zeros(8, 3, 4, 4)}, "start: [8, 3, 4, 4]; give the shape of images"),
    ],
)
def test_what_does_not_fit_the_step_is_refused_by_name(wrong: dict[str, Tensor], told: str) -> None:
    model = make_model()
    step = TrainStep(model, make_optimizer(model, Config()), COUNTS, Config())
    fits = {"images": torch.rand(8, 3, 8, 8), "labels": torch.arange(8) % 5}
    with pytest.raises(ValueError) as refused:
        step(**(fits | wrong))
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize("counts", [COUNTS[:4], [*COUNTS, 1], [*COUNTS[:4], -1], [2.5] * 5, []])
def test_counts_that_are_not_one_number_a_class_are_refused(counts: list[int]) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"^counts: give a .* of the 5 classes .*, got \["):
        TrainStep(model, make_optimizer(model, Config()), counts, Config())


@pytest.mark.parametrize("wrong", [-1, 5])
@pytest.mark.parametrize("config", [Config(), Config(objective="mart", tail="none")])
def test_labels_of_no_class_are_refused_before_anything_is_changed(
    wrong: int, config: Config
) -> None:
    model = make_model()
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="^labels: must be numbers of classes, 0 to 4$"):
        step(torch.rand(3, 3, 8, 8), torch.tensor([0, 4, wrong]))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())

"""The fused step: it equals the reference, never asks the host, and keeps the right statistics."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import official_values as official
import pytest
import torch
from made_step import COUNTS, make_batch, make_model, make_noise, uint8_batch
from no_sync import NoSync
from torch import Tensor

from reat_fast import reference
from reat_fast.config import PRESETS, Config
from reat_fast.engine.reference_step import ReferenceStep
from reat_fast.step import TrainStep, make_optimizer


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
        with pytest.raises(ValueError, match="^--no-fused: the reference is .*; give --"):
            ReferenceStep(model, make_optimizer(model, config), COUNTS, config)


def test_all_that_the_reference_cannot_do_is_named_at_once() -> None:
    model = make_model()
    for preset, flags in (
        ("at-bsl", "--start uniform"),
        ("trades", "--objective bsl --start uniform --attack-loss auto"),
    ):
        with pytest.raises(ValueError, match=f"give {flags}$"):
            ReferenceStep(model, make_optimizer(model, Config()), COUNTS, PRESETS[preset])


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


def test_official_values_are_reached_by_the_fused_step() -> None:
    made, model = official.inputs(), official.TinyNetwork()
    config = Config()
    step = TrainStep(
        model,
        make_optimizer(model, config),
        official.COUNTS,
        config,
    )
    for k in range(3):
        outcome = step(made["images"], made["labels"], made["noise"][k])
        assert float(outcome["loss"]) == pytest.approx(official.STEP_LOSSES[k], rel=1e-4)


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


def test_a_network_that_lacks_what_a_step_asks_for_is_told_what_it_is() -> None:
    network: Any = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4))
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    with pytest.raises(ValueError, match="^model: Sequential needs forward_features_logits"):
        TrainStep(network, optimizer, [1] * 4, Config())


@pytest.mark.parametrize("wrong", [-1, 5])
@pytest.mark.parametrize("config", [Config(), Config(objective="mart", tail="none")])
def test_labels_of_no_class_are_refused_before_anything_is_changed(
    wrong: int, config: Config
) -> None:
    model = make_model()
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    before = copy.deepcopy(model.state_dict())
    images, labels = torch.rand(3, 3, 8, 8), torch.tensor([0, 4, 1])
    for outside in (255 * images, images - 0.5):
        with pytest.raises(
            ValueError, match=r"^images: pixels reach from .*; give them in \[0, 1\]"
        ):
            step(outside, labels)
    with pytest.raises(ValueError, match="^images: there are none"):
        step(images[:0], labels[:0])
    with pytest.raises(ValueError, match="^labels: must be numbers of classes, 0 to 4$"):
        step(torch.rand(3, 3, 8, 8), torch.tensor([0, 4, wrong]))
    assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


def test_a_step_on_bytes_computes_in_the_precision_of_its_network() -> None:
    model = make_model(torch.float64)
    step = TrainStep(model, make_optimizer(model, Config()), COUNTS, Config(steps=1))
    assert step.train_on(uint8_batch())["logits"].dtype == torch.float64


def test_a_network_of_few_bits_and_arrays_of_others_are_refused() -> None:
    model = make_model(torch.bfloat16)
    with pytest.raises(ValueError, match=r"^model: torch.bfloat16; give it in float32"):
        TrainStep(model, make_optimizer(model, Config()), COUNTS, Config())
    model = make_model()
    step = TrainStep(model, make_optimizer(model, Config()), COUNTS, Config())
    images, labels = make_batch()
    with pytest.raises(ValueError, match="^images, labels: ndarray and Tensor; give torch"):
        step(images.numpy(), labels)  # type: ignore[arg-type]

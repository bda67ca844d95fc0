"""The examples of a step: augmentation, start, loss, radii and the epochs of the attack."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from made_step import COUNTS, make_batch, make_model, make_noise, uint8_batch
from torch import Tensor

from reat_fast.config import Config
from reat_fast.engine.augment import apply_policy
from reat_fast.kernels.prepare import prepare
from reat_fast.methods import reference as methods
from reat_fast.methods.attacks import resolve_attack_loss
from reat_fast.step import TrainStep, make_optimizer


def test_rbl_is_attacked_where_it_acts_unless_another_loss_is_named() -> None:
    found = [
        resolve_attack_loss(Config(attack_batchnorm=mode, attack_loss=loss))  # type: ignore[arg-type]
        for mode in ("eval", "train")
        for loss in ("auto", "rbl", "ce")
    ]
    assert found == ["ce", "rbl", "ce", "rbl", "rbl", "ce"]


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


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (Config(attack_form="cudnn"), "cudnn: needs a CUDA device; leave it out"),
        (
            Config(attack_form="cpu", precision="bf16"),
            "cpu: computes in float32, not bfloat16; give",
        ),
    ],
)
def test_a_form_that_would_not_act_is_refused(config: Config, told: str) -> None:
    with pytest.raises(ValueError, match=f"--attack-form {told}"):
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


def test_on_a_cpu_the_attack_alone_is_in_bfloat16_on_batch_statistics_too() -> None:
    config = Config(precision="bf16", attack_batchnorm="train", steps=1)
    step = TrainStep(model := make_model(), make_optimizer(model, config), COUNTS, config)
    seen: list[torch.dtype] = []
    model.fc.register_forward_hook(lambda _, features, logits: seen.append(logits.dtype))
    images, labels = make_batch()
    step(images, labels, make_noise(images, 0))
    assert seen == [torch.bfloat16, torch.float32]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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

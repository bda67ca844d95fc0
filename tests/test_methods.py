"""The methods of the field: they equal plain references and hand-made numbers, and never sync."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
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
    gradients,
    make_images,
    make_network,
    make_noise,
    make_part,
    make_statistics,
    named_objective,
    objective_config,
    total,
)
from torch import Tensor

from reat_fast.attack import ascend_
from reat_fast.config import PRESETS
from reat_fast.methods import reference
from reat_fast.methods.attacks import (
    FreePerturbation,
    choose_attack_loss,
    plan_attack,
)
from reat_fast.methods.cosine_head import CosineHead, use_cosine_head
from reat_fast.methods.objectives import Objective, make_objective, robal_margins
from reat_fast.methods.presets import METHOD_PRESETS
from reat_fast.methods.radii import ClassRadii, class_radius_factors
from reat_fast.methods.weight_perturbation import WeightPerturbation, statistics_kept
from reat_fast.networks.architectures import Network
from reat_fast.objective import ClassStatistics
from reat_fast.reference import rbl_loss, rbl_weights
from reat_fast.step import TrainStep

OBJECTIVES = ["ce", "bsl", "trades", "mart", "robal", "taet-39", "taet-40"]


@pytest.mark.parametrize("case", OBJECTIVES)
def test_an_objective_and_its_gradient_equal_the_reference(case: str) -> None:
    objective, network, epoch = named_objective(case, beta=2.5)
    plain = copy.deepcopy(network)
    clean, labels = make_images()
    adv = (clean + make_noise(clean)).clamp(0, 1)
    part = make_part(clean, adv, labels, epoch)
    logits, terms = objective.compute(network.forward_features_logits, part)
    assert tuple(terms) == objective.terms
    name = case.partition("-")[0]
    expected = reference.loss_of(name, plain, clean, adv, labels, COUNTS, epoch, 2.5)
    torch.testing.assert_close(total(terms), expected, **EXACT)
    assert torch.equal(part.histogram, logits.argmax(1).bincount(minlength=5))
    total(terms).backward()
    expected.backward()
    wanted = gradients(plain)
    assert gradients(network).keys() == wanted.keys()
    for parameter, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, wanted[parameter], **EXACT, msg=parameter)


def learned_from(objective: str, clean: Tensor, adv: Tensor) -> list[Tensor]:
    """Return which images an objective takes, in the order of the reference's forwards."""
    return [clean, adv] if objective in ("trades", "mart", "robal") else [adv]


PREDICTED = [6, 51, 2, 9, 1]  # adversarial examples by predicted class: weights far from equal


@pytest.mark.parametrize(
    ("name", "epoch"), [*((name, 50) for name in METHOD_PRESETS), ("reat-plus", 377)]
)
def test_two_steps_of_a_preset_equal_two_reference_steps(name: str, epoch: int) -> None:
    settings: dict[str, Any] = METHOD_PRESETS[name]
    config = dataclasses.replace(PRESETS[name], policy="none")  # images come as they are
    network = make_network(config.head)
    plain = copy.deepcopy(network)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, 0.9, 0, 5e-4) for n in (network, plain)]
    step = TrainStep(network, optimizers[0], COUNTS, config)
    step.epoch.fill_(epoch)
    step.begin_epoch()
    predicted = {"ae_counts": torch.tensor(PREDICTED), "next_ae_counts": torch.zeros(5).long()}
    step.statistics.load_state_dict(predicted)
    clean, labels = make_images()
    for k in range(2):
        noise = make_noise(clean, seed=k)
        fast = step(clean, labels, noise * step.plan.noise_scale / EPS)["images_adv"]
        slow = reference_step(settings, plain, optimizers[1], clean, labels, noise, epoch)
        torch.testing.assert_close(fast, slow, **EXACT)
    for (key, tensor), other in zip(
        network.state_dict().items(), plain.state_dict().values(), strict=True
    ):
        # Two updates with momentum pass the difference of the gradients on.
        torch.testing.assert_close(tensor, other, rtol=1e-9, atol=1e-9, msg=key)


def reference_step(
    settings: dict[str, Any],
    network: Network,
    optimizer: torch.optim.Optimizer,
    clean: Tensor,
    labels: Tensor,
    noise: Tensor,
    epoch: int,
) -> Tensor:
    radii = [EPS] * 5
    if settings.get("radius") == "class":
        grown = min(epoch / (settings["radius_warmup"] * settings["epochs"]), 1.0)
        radii = [grown * r for r in reference.class_radii(COUNTS, EPS, settings["radius_alpha"])]
    radii = [radii[int(label)] for label in labels]
    weights = torch.from_numpy(rbl_weights(COUNTS, PREDICTED))
    rbl = partial(rbl_loss, weights=weights)  # REAT's own, also where the fast step leaves it out
    losses = {
        "ce": F.cross_entropy,
        "cosine": lambda logits, labels: F.cross_entropy(undone(logits, network), labels),
        "auto": rbl,
        "rbl": rbl,
        "rbl_offsets": partial(reference.rbl_offsets_loss, weights=weights.tolist()),
    }
    name = settings.get("attack_loss", "auto")
    loss = losses[name] if name != "kl" else reference.trades_attack_loss(network, clean)
    scale = 0.001 if settings.get("start") == "normal" else EPS
    step_sizes = [r / EPS * settings.get("step_size", STEP) for r in radii]
    steps = settings.get("steps", 10)
    start = clean + noise * scale / EPS
    if epoch < settings.get("attack_from", 0):  # N-FGSM, which is not brought back to the radius
        start = (clean + noise * 2).clamp(0, 1)
        steps, step_sizes, radii = 1, radii, [math.inf] * len(radii)
    adv = reference.attack(
        network,
        clean,
        labels,
        start,
        loss=loss,
        radii=radii,
        step_sizes=step_sizes,
        steps=steps,
        batchnorm=settings.get("attack_batchnorm", "eval"),
    )
    network.train()

    def of(network: Network) -> Tensor:
        beta = settings.get("beta", 6.0)
        return reference.loss_of(
            settings.get("objective", "bsl"),
            network,
            clean,
            adv,
            labels,
            COUNTS,
            epoch,
            beta,
            tail=settings.get("tail", "official"),
            tail_coefficient=settings.get("tail_coefficient", 1.0),
            label_smoothing=settings.get("label_smoothing", 0.0),
        )

    if settings.get("awp") and epoch >= settings.get("awp_from", 0):
        reference.awp_step(network, optimizer, of, settings["awp"])
        return adv
    optimizer.zero_grad()
    of(network).backward()
    optimizer.step()
    return adv


def undone(logits: Tensor, network: Network) -> Tensor:
    """Take RoBal's scale and compensation out of logits by their published values."""
    shares = torch.tensor(COUNTS, dtype=logits.dtype) / sum(COUNTS)
    return (logits + 0.1 * shares.log()) / 10.0


@pytest.mark.parametrize("case", OBJECTIVES)
def test_parts_of_a_batch_add_up_to_the_whole(case: str) -> None:
    # In eval mode, as rows meet in the BatchNorm of train mode.
    objective, network, epoch = named_objective(case, tail="official")
    network.eval()
    clean, labels = make_images()
    adv = (clean + make_noise(clean)).clamp(0, 1)
    gathered: list[Tensor] = []

    def record(rows: Tensor) -> Tensor:
        gathered.append(rows.detach())
        return rows

    whole = make_part(clean, adv, labels, epoch, gather=record)
    _, terms = objective.compute(network.forward_features_logits, whole)
    total(terms).backward()
    expected = {name: gradient.clone() for name, gradient in gradients(network).items()}
    network.zero_grad()
    values = []
    for rows in (slice(0, 3), slice(3, 10)):
        everything = iter(gathered)

        def gather(own: Tensor, rows: slice = rows, everything: Any = everything) -> Tensor:
            """Do what World.gather does: gradients flow into the own rows alone."""
            others = next(everything)
            return torch.cat([others[: rows.start], own, others[rows.stop :]])

        part = make_part(clean[rows], adv[rows], labels[rows], epoch, total=10, gather=gather)
        _, own = objective.compute(network.forward_features_logits, part)
        total(own).backward()
        values.append(own)
    for name in objective.terms:
        both = values[0][name] if name in objective.whole else values[0][name] + values[1][name]
        torch.testing.assert_close(both, terms[name], **EXACT)
    for parameter, gradient in gradients(network).items():
        torch.testing.assert_close(gradient, expected[parameter], **EXACT, msg=parameter)


@pytest.mark.parametrize("case", ["bsl", "taet-40"])
def test_a_term_of_one_part_after_another_counts_by_its_share_of_the_batch(case: str) -> None:
    objective, network, epoch = named_objective(case, tail="official")
    network.eval()
    clean, labels = make_images()
    alone, in_a_batch = (make_part(clean, clean, labels, epoch, total=n) for n in (10, 40))
    _, terms = objective.compute(network.forward_features_logits, alone)
    _, shares = objective.compute(network.forward_features_logits, in_a_batch)
    for name in objective.terms:
        torch.testing.assert_close(shares[name], terms[name] / 4, **EXACT)


@pytest.mark.usefixtures("forbid_syncs")
@pytest.mark.parametrize("case", [*OBJECTIVES, "bsl-pairwise"])
def test_an_objective_never_makes_the_host_wait(case: str) -> None:
    name, _, epoch = case.partition("-")
    network = make_network("cosine" if name == "robal" else "linear", torch.float32)
    statistics = make_statistics(torch.float32)
    tail = "pairwise" if epoch == "pairwise" else "official"
    objective = make_objective(network, statistics, objective_config(name, tail))
    clean, labels = make_images(dtype=torch.float32)
    part = make_part(clean, clean, labels, int(epoch) if epoch.isdigit() else 0)
    _, terms = objective.compute(network.forward_features_logits, part)
    total(terms).backward()


@pytest.mark.usefixtures("forbid_syncs")
def test_attacks_radii_and_perturbations_never_make_the_host_wait() -> None:
    network = make_network("cosine", torch.float32)
    clean, labels = make_images(dtype=torch.float32)
    statistics = make_statistics(torch.float32)
    ClassRadii(COUNTS, 0.3, 4, clean.device).factors(labels, torch.tensor(2))
    names: list[Any] = ["ce", "bsl", "rbl", "rbl_offsets", "kl", "cosine"]
    for name in names:
        loss = choose_attack_loss(name, network, statistics, partial(network, clean))
        plan = plan_attack("n-fgsm", eps=EPS, step_size=STEP, steps=10)
        start, size = plan.draw_start(clean), plan.step_size
        ascend_(network, start, clean, labels, eps=plan.radius, step_size=size, steps=1, loss=loss)
    with statistics_kept(network):
        F.cross_entropy(network(clean), labels).backward()
    with WeightPerturbation(network, 0.01).perturbed():
        F.cross_entropy(network(clean), labels).backward()
    free = FreePerturbation((10, 3, 8, 8), EPS, clean.device)
    attacked = free.attacked(clean)
    F.cross_entropy(network(attacked), labels).backward()
    free.update_(attacked, clean)


def values_of(name: str, logits: dict[str, Tensor], labels: Tensor, **changes: Any) -> Tensor:
    """Compute an objective for given logits of the clean and the adversarial images."""
    clean = torch.zeros(len(labels), 1, 1, 1, dtype=torch.float64)
    adv = torch.ones_like(clean)

    def forward(images: Tensor) -> tuple[Tensor, Tensor]:
        chosen = logits["adv"] if float(images.sum()) > 0 else logits["clean"]
        return chosen, chosen

    network = changes.pop("network", None) or make_network()
    statistics = changes.pop("statistics", None) or make_statistics()
    histogram = torch.zeros(logits["adv"].shape[1], dtype=torch.int64)
    part = make_part(clean, adv, labels, changes.pop("epoch", 0), histogram=histogram)
    objective = make_objective(network, statistics, objective_config(name, **changes))
    return total(objective.compute(forward, part)[1])


def made_logits() -> tuple[dict[str, Tensor], Tensor]:
    made = torch.Generator().manual_seed(11)
    logits = {k: torch.randn(6, 5, generator=made, dtype=torch.float64) for k in ("clean", "adv")}
    return logits, torch.tensor([0, 3, 1, 1, 2, 0])


def test_methods_reduce_to_cross_entropy_where_they_should() -> None:
    logits, labels = made_logits()
    clean, adv = (F.cross_entropy(logits[k], labels) for k in ("clean", "adv"))
    torch.testing.assert_close(values_of("trades", logits, labels, beta=0.0), clean, **EXACT)
    torch.testing.assert_close(values_of("taet", logits, labels, epoch=39), clean, **EXACT)
    torch.testing.assert_close(values_of("ce", logits, labels), adv, **EXACT)
    even = ClassStatistics([9] * 5, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(values_of("bsl", logits, labels, statistics=even), adv, **EXACT)
    constants = {"margin": 0.0, "margin_tau": 0.0, "beta": 0.0, "statistics": even}
    network = make_network()
    use_cosine_head(network)
    found = values_of("robal", logits, labels, network=network, **constants)
    torch.testing.assert_close(found, adv, **EXACT)
    # The same images twice: no divergence.
    same = {"clean": logits["clean"], "adv": logits["clean"]}
    torch.testing.assert_close(values_of("trades", same, labels, beta=6.0), clean, **EXACT)


def test_trades_smooths_the_labels_of_its_clean_images_alone() -> None:
    logits, labels = made_logits()
    smoothed = F.cross_entropy(logits["clean"], labels, label_smoothing=0.1)
    divergence = 6.0 * reference.kl(logits["clean"], logits["adv"]).mean()
    found = values_of("trades", logits, labels, beta=6.0, label_smoothing=0.1)
    torch.testing.assert_close(found, smoothed + divergence, **EXACT)


def test_mart_on_hand_made_probabilities() -> None:
    # Clean p = (1/2, 1/4, 1/4), adversarial p = (1/4, 1/2, 1/4), label 0, beta 4.
    rows = {"clean": [[0.5, 0.25, 0.25]], "adv": [[0.25, 0.5, 0.25]]}
    logits = {k: torch.tensor(p, dtype=torch.float64).log() for k, p in rows.items()}
    found = values_of("mart", logits, torch.tensor([0]), beta=4.0)
    boosted = -math.log(0.25) - math.log(1.0001 - 0.5)
    divergence = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert float(found) == pytest.approx(boosted + 4 * 0.5000001 * divergence, rel=1e-12)


@pytest.mark.parametrize("name", ["ce", "bsl", "trades", "mart", "taet"])
def test_no_gradient_is_one_that_deterministic_algorithms_copy_from_the_host(name: str) -> None:
    """Of rows, gather, scatter and max have such gradients, which no captured step can hold."""
    logits, labels = made_logits()
    loss = values_of(name, {k: z.requires_grad_() for k, z in logits.items()}, labels, epoch=40)
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [following for following, _ in node.next_functions]
    names = {node.name() for node in seen}
    assert len(names) > 2 and not {n for n in names if n.startswith(("Gather", "Scatter", "Max"))}


def test_taet_on_hand_made_losses() -> None:
    # Losses ln 2 and ln 4 in class 0, ln 8 in class 1, no image of class 2: L = (1.5, 3, 0) ln 2.
    chances = [[1 / 2, 1 / 4, 1 / 4], [1 / 4, 1 / 2, 1 / 4], [1 / 2, 1 / 8, 3 / 8]]
    logits = torch.tensor(chances, dtype=torch.float64).log()
    labels = torch.tensor([0, 0, 1])
    found = values_of("taet", {"adv": logits, "clean": logits}, labels, epoch=40)
    ln2 = math.log(2)
    deviation = (0.0 + (1.5 * ln2) ** 2 + (1.5 * ln2) ** 2) / 3
    shares = (1 / 3) ** 2 + (2 / 3) ** 2
    assert float(found) == pytest.approx(0.1 * (1.5 * ln2 + deviation + shares), rel=1e-12)
    certain = 1000 * torch.eye(3, dtype=torch.float64)[labels]  # no loss in any class
    assert float(values_of("taet", {"adv": certain, "clean": certain}, labels, epoch=40)) == 0


def test_robal_margins_grow_with_the_logarithm_of_the_class_size() -> None:
    margins = robal_margins(torch.tensor([1000, 100, 10]), torch.tensor(10.0), 0.1, 0.3)
    ln10 = math.log(10)
    # Float32: a logarithm near 5 keeps 5e-7 of it.
    assert margins.tolist() == pytest.approx([0.1 + 0.06 * ln10, 0.1 + 0.03 * ln10, 0.1], abs=1e-6)


def forward_in(network: Network, low: bool, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        return network.forward_features_logits(images)


def test_every_objective_takes_logits_of_low_precision() -> None:
    names: list[Any] = ["ce", "bsl", "trades", "mart", "robal", "taet"]
    for name in names:
        network = make_network("cosine" if name == "robal" else "linear", torch.float32)
        statistics = make_statistics(torch.float32)
        objective = make_objective(network, statistics, objective_config(name))
        clean, labels = make_images(dtype=torch.float32)
        adv = (clean + make_noise(clean)).clamp(0, 1)
        found = []
        for low in (False, True):
            forward = partial(forward_in, network, low)
            _, terms = objective.compute(forward, make_part(clean, adv, labels, 60))
            assert all(term.dtype == torch.float32 for term in terms.values())
            found.append(float(total(terms).detach()))
        # A bfloat16 keeps 8 bits, and a dozen layers round to it.
        assert found[1] == pytest.approx(found[0], rel=0.03)


def test_what_cannot_be_is_refused_in_one_line() -> None:
    network, statistics = make_network(), make_statistics()

    def objective(name: str) -> Objective:
        return make_objective(network, statistics, objective_config(name))

    attack_loss: Any = partial(
        choose_attack_loss, network=network, statistics=statistics, clean_logits=network
    )
    plan: Any = partial(plan_attack, eps=EPS, step_size=STEP, steps=1)
    refused: list[tuple[str, Callable[[], Any]]] = [
        ("--objective rade: is unknown", lambda: objective("rade")),
        ("--head cosine", lambda: objective("robal")),
        ("--head cosine", lambda: attack_loss("cosine")),
        ("--attack-loss", lambda: attack_loss("mse")),
        ("--attack cw", lambda: plan("cw")),
        ("--head-scale", lambda: CosineHead(4, 3, 0.0)),
        ("--radius-alpha", lambda: class_radius_factors([5, 2], 1.5)),
        ("--radius class", lambda: class_radius_factors([5, 5], 0.3)),
        ("--awp", lambda: WeightPerturbation(network, 0.0)),
    ]
    for flag, call in refused:
        with pytest.raises(ValueError, match=flag) as caught:
            call()
        assert "\n" not in str(caught.value)

"""The attacks by name, their losses, and the same images as torchattacks finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_data import made_images
from torch import Tensor, nn

from reat_fast.attack import PGD
from reat_fast.data import ImageSet
from reat_fast.evaluate import evaluate
from reat_fast.evaluation.attacks import L2_EPS, Attack, cw_loss, lsa_loss, margin, threat_text
from reat_fast.evaluation.victim import attacked
from reat_fast.kernels.prepare import prepare
from reat_fast.models import create_model

EPS, STEP = 16 / 255, 4 / 255


def test_attacks_by_name() -> None:
    assert Attack.from_name("clean", EPS, STEP).steps == 0
    assert Attack.from_name("fgsm", EPS, STEP) == Attack("fgsm", 1, EPS, False, eps=EPS)
    assert Attack.from_name("pgd20", EPS, STEP) == Attack("pgd20", 20, STEP, True, eps=EPS)
    assert Attack.from_name("cw20", EPS, STEP) == Attack("cw20", 20, STEP, True, loss="cw", eps=EPS)
    assert Attack.from_name("lsa7", EPS, STEP) == Attack("lsa7", 7, STEP, True, loss="lsa", eps=EPS)
    searched = Attack.from_name("l2aa", EPS, STEP, l2_eps=0.5)
    assert (searched.norm, searched.radius(EPS)) == ("l2", 0.5)
    assert Attack.from_name("aa", EPS) == Attack("aa", 0, 0.0, False, eps=EPS)
    assert Attack.from_name("aa", EPS).radius(EPS) == EPS
    in_l2 = Attack.from_name("l2pgd20", EPS, STEP, l2_eps=0.5)
    assert in_l2 == Attack("l2pgd20", 20, 0.5 * 15 / 128, True, l2_eps=0.5)
    assert (in_l2.norm, in_l2.radius(EPS)) == ("l2", 0.5)
    for name in (
        "l2",
        "l2pgd",
        "l2cw20",
        "pgd",
        "pgd0",
        "pgd-1",
        "PGD20",
        "aaa",
        "cw",
        "lsa0",
        "autoattack",
        "pgd20 ",
    ):
        with pytest.raises(
            ValueError, match=f"^--attacks: unknown attack '{name}'; attacks are clean, fgsm"
        ):
            Attack.from_name(name, EPS, STEP)


def test_figures_name_the_ball_of_their_attack() -> None:
    told = {"eps": 8 / 255, "step_size": 2 / 255, "l2_eps": 0.5, "attacks": {"pgd20": {}}}
    assert threat_text(told) == "L-infinity eps 8/255, step 2/255"
    told["attacks"] = {"pgd20": {}, "l2aa": {}}
    assert threat_text(told).endswith("; L2 eps 0.5")  # AutoAttack finds its steps itself
    told["attacks"] = {"pgd20": {}, "l2pgd20": {}}
    assert threat_text(told) == "L-infinity eps 8/255, step 2/255; L2 eps 0.5, step 0.0585938"
    told["attacks"] = {"clean": {}, "l2aa": {}}
    assert threat_text(told) == "L2 eps 0.5"  # nothing was attacked in L-infinity
    told["attacks"] = {"clean": {}}
    assert threat_text(told) == "L-infinity eps 8/255, step 2/255"
    assert [threat_text(told, name) for name in ("pgd20", "l2pgd20")] == ["eps 8/255", "L2 eps 0.5"]


def test_an_attack_says_what_it_costs() -> None:
    # Twenty steps of forward and gradient, and one forward for the verdict.
    assert Attack.from_name("pgd20", EPS, STEP).passes == 41
    assert Attack.from_name("clean", EPS, STEP).passes == 1


def test_the_margin_is_negative_where_the_label_loses() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.5], [0.0, 4.0, -1.0], [2.0, 2.0, 1.0]])
    assert margin(logits, torch.tensor([0, 2, 1])).tolist() == [0.5, -5.0, 0.0]


def test_the_cw_loss_is_that_of_the_field() -> None:
    # As in the evaluation of AT-BSL: one-hot masks, -10000 on the label, confidence 50.
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double() * 30
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    logits[5] = torch.tensor([-70.0, 5.0, 0.0, 0.0, 0.0])  # lost by more than 50: no gradient
    plain, ours = (logits.clone().requires_grad_() for _ in range(2))
    one_hot = nn.functional.one_hot(labels, 5)
    real = (one_hot * plain).sum(1)
    other = ((1 - one_hot) * plain - one_hot * 10000).max(1)[0]
    expected = torch.sum(-torch.clamp(real - other + 50, min=0))
    found = cw_loss(ours, labels)
    expected.backward()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-15)
    assert torch.equal(ours.grad, plain.grad)
    kept = (other - real).detach() < 50
    assert ours.grad.any(1).tolist() == kept.tolist() and 0 < kept.sum() < 6


def test_the_lsa_loss_is_the_cross_entropy_of_ten_times_the_logits() -> None:
    logits, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 2, 0])
    expected = nn.functional.cross_entropy(10 * logits, labels, reduction="sum")
    assert lsa_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-12)


def test_lsa_moves_images_whose_cross_entropy_has_no_gradient_left() -> None:
    # Logits a thousand times smaller than usual: CE still has a sign, but with logits a hundred
    # times larger its float32 gradient is exactly zero, which a tenth of them (alpha 0.1) mends.
    logits = torch.tensor([[2000.0, 0.0]], requires_grad=True)
    nn.functional.cross_entropy(logits, torch.tensor([0])).backward()
    assert not logits.grad.any()
    small = torch.tensor([[1e-9, 0.0]], requires_grad=True)
    lsa_loss(small, torch.tensor([0])).backward()
    assert small.grad.abs().min() == pytest.approx(5.0, rel=1e-6)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Return a smooth network: no pixel whose gradient is zero up to the sign of its rounding."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
    model = nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), nn.Linear(128, 4))
    return model.double().eval()


@pytest.fixture(scope="module")
def image_set() -> ImageSet:
    labels = np.arange(24, dtype=np.int64) % 4
    return ImageSet(made_images(labels, 3, seed=4), labels)


def clean_and_start(image_set: ImageSet) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.from_numpy(image_set.images)
    clean, start = prepare(images, torch.arange(len(images)), 0, 0, EPS, padding=0, flip=False)
    return clean.double(), start.double(), torch.from_numpy(image_set.labels)


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        return self.factor * self.model(images)


@pytest.mark.parametrize(("name", "factor"), [("fgsm", 1.0), ("pgd5", 1.0), ("lsa5", 10.0)])
def test_the_images_are_those_of_torchattacks(
    model: nn.Module, image_set: ImageSet, name: str, factor: float
) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    clean, start, labels = clean_and_start(image_set)
    untouched = clean.clone()
    start = start.clamp(0, 1)  # torchattacks clamps the start, the official REAT code does not
    attack = Attack.from_name(name, EPS, STEP)
    with attacked(model) as victim:
        ours = attack.perturb(victim, clean, start, labels, EPS)
    scaled = Scaled(model, factor).eval()
    if name == "fgsm":
        theirs = torchattacks.FGSM(scaled, eps=EPS)(clean, labels)
    else:
        # The package draws its own start: let it draw ours.
        package = torchattacks.PGD(scaled, eps=EPS, alpha=STEP, steps=5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "uniform_", lambda self, low, high: start - clean)
            theirs = package(clean, labels)
    # Ours steps by the float32 number nearest to eps, theirs by the double: 4e-9 apart, five times.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=3e-8)
    assert torch.equal(clean, untouched) and not torch.equal(ours, clean)


def test_attacks_in_l2_are_a_plain_loop_from_the_edge_of_the_ball(
    model: nn.Module, image_set: ImageSet
) -> None:
    clean, start, labels = clean_and_start(image_set)
    attack = Attack.from_name("l2pgd5", EPS, STEP)
    adv, noise = attack.begin(clean, start), (start - clean).flatten(1)
    lengths = (adv - clean).flatten(1).norm(dim=1)
    assert (nn.functional.cosine_similarity((adv - clean).flatten(1), noise) > 0.999).all()
    torch.testing.assert_close(lengths, torch.full_like(lengths, L2_EPS))
    for _ in range(5):
        leaf = adv.clone().requires_grad_()
        total = nn.functional.cross_entropy(model(leaf), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(total, leaf)
        length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        moved = adv + 15 / 255 * gradient / length
        adv = (clean + (moved - clean).renorm(2, 0, L2_EPS)).clamp(0, 1)
    with attacked(model) as victim:
        ours = attack.perturb(victim, clean, start, labels, EPS)
    torch.testing.assert_close(ours, adv, rtol=0, atol=1e-6)  # renorm adds 1e-7 to the length


def test_the_images_in_l2_are_those_of_torchattacks(model: nn.Module, image_set: ImageSet) -> None:
    torchattacks = pytest.importorskip("torchattacks")
    clean, _, labels = clean_and_start(image_set)
    clean = clean.contiguous()
    theirs = torchattacks.PGDL2(model, eps=0.5, alpha=0.1, steps=5, random_start=False)
    ours = PGD(model, eps=0.5, alpha=0.1, steps=5, random_start=False, norm="l2")
    # The package adds 1e-10 to the length of a gradient.
    torch.testing.assert_close(ours(clean, labels), theirs(clean, labels), rtol=0, atol=1e-6)


def test_cw_is_a_plain_loop_over_the_margin(model: nn.Module, image_set: ImageSet) -> None:
    clean, start, labels = clean_and_start(image_set)
    adv = start
    for _ in range(5):
        leaf = adv.clone().requires_grad_()
        logits = model(leaf)
        real = logits[torch.arange(len(labels)), labels]
        other = (logits - 1e4 * nn.functional.one_hot(labels, 4)).max(1).values
        (gradient,) = torch.autograd.grad(-(real - other).sum(), leaf)
        adv = (adv + STEP * gradient.sign()).clamp(clean - EPS, clean + EPS).clamp(0, 1)
    with attacked(model) as victim:
        ours = Attack.from_name("cw5", EPS, STEP).perturb(victim, clean, start, labels, EPS)
    torch.testing.assert_close(ours, adv, rtol=0, atol=3e-8)  # float32 steps, as above


def test_an_image_counts_only_if_it_withstands_every_restart(model: nn.Module) -> None:
    # One step in a wide ball: where it begins decides which images fall.
    eps = 0.25
    attack = Attack.from_name("pgd1", eps, eps / 4)
    labels = np.arange(200, dtype=np.int64) % 4
    image_set = ImageSet(made_images(labels, 3, seed=4), labels)
    images, rows = torch.from_numpy(image_set.images), torch.arange(200)
    singles = []
    for restart in range(3):
        clean, start = prepare(images, rows, 0, restart, eps, padding=0, flip=False)
        own = torch.from_numpy(labels)
        with attacked(model) as victim:
            adv = attack.perturb(victim, clean.double(), start.double(), own, eps)
            singles.append(~victim.fooled(adv, own))
    stood = [int(right.sum()) for right in singles]
    both, all_three = (int(torch.stack(singles[:n]).all(0).sum()) for n in (2, 3))
    assert 0 < all_three < both < min(stood)
    for restarts, expected in ((1, stood[0]), (2, both), (3, all_three)):
        for batch_size in (64, 200):
            found = evaluate(
                model, image_set, [attack], 4, eps=eps, restarts=restarts, batch_size=batch_size
            )
            assert found["attacks"]["pgd1"]["overall"] == pytest.approx(100 * expected / 200)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_the_search_may_be_coarse_but_the_verdict_is_the_models(
    image_set: ImageSet, precision: str
) -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", 4, width=8).eval()
    clean, _, labels = clean_and_start(image_set)
    with attacked(model, precision) as victim:
        coarse, exact = victim(clean.float()), victim.true_logits(clean.float())
        assert torch.equal(exact, model(clean.float()))
        assert coarse.dtype == torch.float32
        # bfloat16 has 8 bits: three layers of them are within a few per cent of the largest logit.
        torch.testing.assert_close(coarse, exact, rtol=0, atol=0.05 * float(exact.abs().max()))
        if precision == "bf16":
            assert not torch.equal(coarse, exact)
            with victim.finer(clean.float()):  # folding rounds each weight once more in float32
                torch.testing.assert_close(victim(clean.float()), exact, rtol=1e-4, atol=1e-6)
            assert torch.equal(victim(clean.float()), coarse)
    before = evaluate(model, image_set, [Attack.from_name("clean", EPS, STEP)], 4)
    after = evaluate(model, image_set, [Attack.from_name("clean", EPS, STEP)], 4, precision="bf16")
    assert before == after

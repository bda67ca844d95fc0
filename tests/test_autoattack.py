"""Our AutoAttack: each attack against the package's, and what makes it fast, beside it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from made_search import CLASSES, EPS, EPS_L2, RADII, made, search
from torch import Tensor, nn

from reat_fast.attack import Norm
from reat_fast.evaluation import apgd, autoattack
from reat_fast.evaluation.autoattack import AutoAttack
from reat_fast.evaluation.ball import Ball
from reat_fast.evaluation.fab import fab
from reat_fast.evaluation.packaged import package_autoattack
from reat_fast.evaluation.passes import filled_up
from reat_fast.evaluation.square import square
from reat_fast.evaluation.victim import Victim, attacked

Find = Callable[[Victim, Tensor, Tensor, Tensor], Tensor]
NOISE = 2 * torch.rand(60, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 1
START_L2 = Ball("l2", EPS_L2).to_surface(NOISE)
FINDERS: dict[str, Find] = {
    "apgd-ce": lambda v, x, y, t: apgd.apgd(
        v, x, y, t, EPS * NOISE, apgd.cross_entropy, eps=EPS, steps=20
    ),
    "apgd-t": lambda v, x, y, t: apgd.apgd(
        v, x, y, t, EPS * NOISE, apgd.targeted_dlr, eps=EPS, steps=20
    ),
    "fab-t": lambda v, x, y, t: fab(v, x, y, t, eps=EPS, steps=20),
    "square": lambda v, x, y, t: square(v, x, y, torch.arange(len(x)), eps=EPS, queries=200),
    "apgd-ce l2": lambda v, x, y, t: apgd.apgd(
        v, x, y, t, START_L2, apgd.cross_entropy, eps=EPS_L2, steps=20, norm="l2"
    ),
    "apgd-t l2": lambda v, x, y, t: apgd.apgd(
        v, x, y, t, START_L2, apgd.targeted_dlr, eps=EPS_L2, steps=20, norm="l2"
    ),
    "fab-t l2": lambda v, x, y, t: fab(v, x, y, t, eps=EPS_L2, steps=20, norm="l2"),
    "square l2": lambda v, x, y, t: square(
        v, x, y, torch.arange(len(x)), eps=EPS_L2, queries=200, norm="l2"
    ),
}


@pytest.mark.parametrize("name", FINDERS)
def test_what_is_found_fools_the_model_within_the_ball(
    model: nn.Module, test_set: tuple[Tensor, Tensor], name: str
) -> None:
    images, labels = test_set
    with attacked(model) as victim:
        targets = victim.true_logits(images).argsort(1, descending=True)[:, 1]
        found = FINDERS[name](victim, images, labels, targets)
    moved = (found != images).flatten(1).any(1)
    wrong = model(found).argmax(1) != labels
    assert torch.equal(moved | (model(images).argmax(1) != labels), wrong)
    assert 0 < moved.sum() < len(images)
    assert found.min() >= 0 and found.max() <= 1
    if name.endswith("l2"):
        # All 192 pixels are rounded by half a unit in the last place of 1, and the length is.
        lengths = (found - images).double().flatten(1).norm(dim=1)
        assert lengths.max() <= EPS_L2 * (1 + 2**-21) + 192**0.5 * 2**-24
        assert lengths[moved].max() > 0.9 * EPS_L2
    else:
        # clean + eps is rounded once: half a unit in the last place of a number up to 2.
        assert (found - images).abs().max() <= EPS + 2**-23


def shorten_package(patch: pytest.MonkeyPatch, steps: int, queries: int) -> None:
    """Let the package's attacks take so many steps, and Square so many queries."""
    from pyautoattack.autopgd_base import APGDAttack
    from pyautoattack.fab_base import FABAttack
    from pyautoattack.square import SquareAttack

    # Auto-PGD plans its step sizes when it is made, the others read their numbers when they run.
    begin, fab_perturb, square_perturb = (
        APGDAttack.__init__,
        FABAttack.perturb,
        SquareAttack.perturb,
    )

    def short_apgd(self: object, *given: object, **named: object) -> None:
        begin(self, *given, **{**named, "n_iter": steps})

    def short_fab(self: object, *batch: Tensor) -> Tensor:
        self.n_iter = steps
        return fab_perturb(self, *batch)

    def short_square(self: object, *batch: Tensor) -> Tensor:
        self.n_queries = queries
        return square_perturb(self, *batch)

    patch.setattr(APGDAttack, "__init__", short_apgd)
    patch.setattr(FABAttack, "perturb", short_fab)
    patch.setattr(SquareAttack, "perturb", short_square)


@pytest.mark.parametrize("norm", RADII)
def test_the_robust_accuracy_is_that_of_the_package(
    model: nn.Module, test_set: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, norm: Norm
) -> None:
    """Both run in full, but for Square: 500 queries instead of 5000 keep the test quick."""
    pytest.importorskip("pyautoattack")
    images, labels = test_set
    with attacked(model) as victim:
        standing = search(
            victim, images, labels, eps=RADII[norm], steps=100, queries=500, norm=norm
        ).run()
    shorten_package(monkeypatch, steps=100, queries=500)
    theirs = package_autoattack(
        model, images, labels, eps=RADII[norm], seed=0, batch_size=64, norm=norm
    )
    after, ours = standing.after, standing.robust
    assert after["clean"] > 54 and 12 < after["square"] < 48
    assert after["square"] == ours.sum()
    # Random starts: over seeds each of the two varies by an image of these 60.
    assert abs(int(ours.sum()) - int(theirs.sum())) <= 1


@pytest.mark.parametrize("norm", RADII)
def test_of_a_thousand_images_the_same_stand_as_with_the_package(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch, norm: Norm
) -> None:
    pytest.importorskip("pyautoattack")
    images, labels = made(1000, seed=2)
    with attacked(model) as victim:
        ours = search(
            victim, images, labels, eps=RADII[norm], norm=norm, steps=10, queries=20, batch_size=500
        ).run()
    shorten_package(monkeypatch, steps=10, queries=20)
    theirs = package_autoattack(
        model, images, labels, eps=RADII[norm], seed=0, batch_size=500, norm=norm
    )
    assert 400 < int(ours.robust.sum()) < 700
    # A tenth of a point. Random starts: of two seeds, ours or the package's, one image differs.
    assert int((ours.robust != theirs).sum()) <= 1


def test_every_attack_takes_its_part(model: nn.Module, test_set: tuple[Tensor, Tensor]) -> None:
    with attacked(model) as victim:
        run = search(victim, *test_set)
        standing = run.run()
    assert [stage for stage, _ in run.runs] == (
        ["clean", "apgd-ce"] + ["apgd-t"] * 5 + ["fab-t"] * 5 + ["square"]
    )
    accuracies = list(standing.after.values())
    assert list(standing.after) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    assert accuracies == sorted(accuracies, reverse=True) and accuracies[1] < accuracies[0]


def test_targets_go_down_the_logits_and_starts_reach_the_radius(
    model: nn.Module, test_set: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = test_set
    aims: dict[str, list[Tensor]] = {"apgd": [], "fab": []}
    starts: list[Tensor] = []

    def idle_apgd(
        victim: Victim,
        clean: Tensor,
        own: Tensor,
        targets: Tensor,
        noise: Tensor,
        *_: object,
        **__: object,
    ) -> Tensor:
        aims["apgd"].append(targets)
        starts.append(noise)
        return clean

    def idle_fab(
        victim: Victim, clean: Tensor, own: Tensor, targets: Tensor, **_: object
    ) -> Tensor:
        aims["fab"].append(targets)
        return clean

    monkeypatch.setattr(apgd, "apgd", idle_apgd)
    monkeypatch.setattr(autoattack, "fab", idle_fab)
    with attacked(model) as victim:
        search(victim, images, labels, queries=0, eps=0.25).run()
    right = model(images).argmax(1) == labels
    order = model(images[right]).argsort(1, descending=True)
    assert (order[:, 0] == labels[right]).all()
    for found in (aims["apgd"][1:], aims["fab"]):
        assert torch.equal(torch.stack(found, 1), order[:, 1:])
    for noise in starts:
        assert (noise.abs().flatten(1).amax(1) == 0.25).all()  # one pixel of each image
        assert abs(float(noise.mean())) < 0.01  # of 10,000 numbers: a deviation of 0.0015
    assert len({float(noise.sum()) for noise in starts}) == CLASSES  # new in each run
    starts.clear()
    with attacked(model) as victim:
        search(victim, images, labels, queries=0, eps=0.25, norm="l2").run()
    for noise in starts:  # evenly in all directions: of a pixel 0.25^2 / 192 on average
        torch.testing.assert_close(noise.flatten(1).norm(dim=1), torch.full((len(noise),), 0.25))
        squares = 192 / 0.25**2 * noise**2
        assert float((squares.mean((0, 2, 3)) - 1).abs().max()) < 0.1  # of 3,500 a channel
        assert 2.5 < float(squares.square().mean()) < 3.5  # 1.8 of even numbers
    assert len({float(noise.sum()) for noise in starts}) == CLASSES


def test_fab_stands_where_the_package_stands(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    pyautoattack = pytest.importorskip("pyautoattack")
    images, labels = test_set
    package = pyautoattack.AutoAttack(model, eps=EPS, seed=0, version="custom", attacks=["fab-t"])
    package.fab.n_target_classes = CLASSES - 1
    adv, _ = package.run_standard_evaluation(images, labels, batch_size=64)
    expected = model(adv).argmax(1) == labels
    right = model(images).argmax(1) == labels
    with attacked(model) as victim:
        order = victim.true_logits(images).argsort(1, descending=True)
        for rank in range(1, CLASSES):
            found = fab(victim, images, labels, order[:, rank], eps=EPS, steps=100)
            right &= ~victim.fooled(found, labels)
    # No random numbers: the same images, but for one that rounding may leave on the other side.
    assert int((right != expected).sum()) <= 1
    assert 0 < int(right.sum()) < 60


def test_apgd_finds_what_the_packages_finds(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    pyautoattack = pytest.importorskip("pyautoattack")
    images, labels = test_set
    package = pyautoattack.AutoAttack(model, eps=EPS, seed=0, version="custom", attacks=["apgd-ce"])
    package.apgd.n_restarts = 1
    adv, _ = package.run_standard_evaluation(images, labels, batch_size=64)
    with attacked(model) as victim:
        found = apgd.apgd(victim, images, labels, labels, EPS * NOISE, apgd.cross_entropy, eps=EPS)
        right = ~victim.fooled(found, labels)
    # Another random start: an image on the border may fall to one of them and not to the other.
    assert int((right != (model(adv).argmax(1) == labels)).sum()) <= 1


def test_square_finds_as_much_as_the_packages(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    pyautoattack = pytest.importorskip("pyautoattack")
    images, labels = test_set
    ours, theirs = [], []
    for seed in range(3):
        package = pyautoattack.AutoAttack(
            model, eps=EPS, seed=seed, version="custom", attacks=["square"]
        )
        package.square.n_queries = 300
        # The package never puts a square at the last row or column: much of an image of 8x8.
        short = package.square.random_int
        package.square.random_int = lambda low, high, draw=short: draw(low, high + 1)
        adv, _ = package.run_standard_evaluation(images, labels, batch_size=64)
        theirs.append(int((model(adv).argmax(1) == labels).sum()))
        with attacked(model) as victim:
            found = square(
                victim, images, labels, torch.arange(60), eps=EPS, seed=seed, queries=300
            )
            ours.append(int((~victim.fooled(found, labels)).sum()))
    # The package draws one square a query for all images: seeds differ by 3 or so, their mean by 2.
    assert abs(np.mean(ours) - np.mean(theirs)) <= 4
    assert 0 < np.mean(ours) < 60


def test_what_stands_is_said_after_each_of_its_attacks(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    said: list[str] = []
    with attacked(model, say=said.append) as victim:
        after = search(victim, *test_set).run().after
    assert list(after) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
    expected = [
        f"AutoAttack: {100 * found / 60:.2f} % stand after {name}" for name, found in after.items()
    ]
    assert [re.sub(r", \d+ s$", "", line) for line in said] == expected
    assert all(line.endswith(" s") for line in said)


def test_no_image_counts_as_fooled_that_the_model_itself_gets_right(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, labels = test_set
    with attacked(model) as victim:
        right = ~victim.fooled(images, labels)
        honest = victim._frozen
        # Quick logits that always name another class suspect every image at every step.
        victim._frozen = lambda x: -honest(x)
        standing = search(victim, images, labels, steps=3, queries=3, eps=0.0).run()
    assert torch.equal(standing.robust, right)


def test_what_quick_logits_call_right_to_the_end_is_judged_at_its_best(
    model: nn.Module, test_set: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    with attacked(model) as victim:
        right = ~victim.fooled(*test_set)
        images, labels = (tensor[right] for tensor in test_set)
        monkeypatch.setattr(victim, "confirmed", lambda seen, *others: torch.zeros_like(seen))
        noise = EPS * NOISE[: len(labels)]
        found = apgd.apgd(
            victim, images, labels, labels, noise, apgd.cross_entropy, eps=EPS, steps=8
        )
        assert victim.fooled(found, labels).any()


@contextmanager
def attacked_as_on_a_gpu(model: nn.Module) -> Iterator[Victim]:
    """Attack with the networks that a GPU gets for bf16, computed by PyTorch's operators."""
    with attacked(model, "bf16") as victim:
        victim._on_gpu = True
        victim._networks.clear()
        victim._frozen = victim._network(torch.bfloat16)
        yield victim


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
def test_bfloat16_search_confirmed_in_float32_comes_to_the_same(
    model: nn.Module, test_set: tuple[Tensor, Tensor], as_on_a_gpu: bool
) -> None:
    images, labels = test_set
    with attacked_as_on_a_gpu(model) if as_on_a_gpu else attacked(model, "bf16") as victim:
        coarse = search(victim, images, labels).run().robust
        finer = torch.float16 if as_on_a_gpu else None
        assert set(victim._networks) == {torch.bfloat16, finer}
    with attacked(model) as victim:
        exact = search(victim, images, labels).run().robust
    # bfloat16 resolves margins to 1 part in 256: an image of 60 may be missed, or gained by luck.
    assert int((coarse != exact).sum()) <= 2


def test_fab_finds_in_float16_what_it_finds_in_float32(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, labels = test_set
    fooled = []
    for open_to in (attacked, attacked_as_on_a_gpu):
        with open_to(model) as victim, victim.finer(images):
            targets = victim.true_logits(images).argsort(1, descending=True)[:, 1]
            found = fab(victim, images, labels, targets, eps=EPS, steps=30)
            fooled.append(victim.fooled(found, labels))
    assert 10 < int(fooled[0].sum()) < 50
    assert int((fooled[0] != fooled[1]).sum()) <= 1


def test_logits_beyond_float16_are_searched_in_float32(
    model: nn.Module, test_set: tuple[Tensor, Tensor]
) -> None:
    images, _ = test_set
    large = copy.deepcopy(model)
    with torch.no_grad():
        large[-1].weight.mul_(2.0**17 / model(images).abs().max())  # type: ignore[operator, index]
    for network, dtype in ((model, torch.float16), (large, None)):
        with attacked_as_on_a_gpu(network) as victim:
            coarse = victim(images)
            with victim.finer(images):
                assert victim._frozen is victim._networks[dtype]
                fine = victim(images)
            assert fine.isfinite().all() and torch.equal(victim(images), coarse)
            exact = victim.true_logits(images)
            assert float((fine - exact).norm()) < 0.3 * float((coarse - exact).norm())


def test_batches_are_filled_up_to_few_sizes() -> None:
    images = torch.rand(1024, 1, 1, 1) + 1
    sizes = set()
    for count in range(1, len(images) + 1):
        filled = filled_up(images[:count])
        assert torch.equal(filled[:count], images[:count]) and not filled[count:].any()
        assert len(filled) < max(1.25 * count, count + 4)
        sizes.add(len(filled))
    assert sorted(sizes)[:9] == [4, 8, 12, 16, 20, 24, 28, 32, 40] and len(sizes) == 28


def test_batches_are_as_large_as_each_other(
    model: nn.Module, test_set: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = test_set
    with attacked(model) as victim:
        found = search(victim, images, labels, batch_size=25)
        sizes: list[int] = []

        def survive(stage: str, rank: int, rows: Tensor) -> Tensor:
            pending = found.standing.pending  # what a search that ends here would go on with
            assert pending is not None and torch.equal(pending[: len(rows)], rows)
            sizes.append(len(rows))
            return torch.ones(len(rows), dtype=torch.bool)

        monkeypatch.setattr(found, "_survive", survive)
        found.run()
    assert sizes == [20] * 3 * len(found.runs)


def test_few_classes_and_bad_models_are_refused(model: nn.Module) -> None:
    images = torch.rand(4, 3, 8, 8)
    labels = torch.zeros(4, dtype=torch.int64)
    three = nn.Sequential(model, nn.Linear(CLASSES, 3)).eval()
    with pytest.raises(ValueError, match="needs 4 classes, the model has 3; use pgd100"):
        autoattack.autoattack(three, images, labels)
    with pytest.raises(ValueError, match="in train mode"):
        autoattack.autoattack(nn.Sequential(model), images, labels)


def test_the_function_returns_which_images_stand(
    model: nn.Module, test_set: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = test_set
    shortened = {**AutoAttack.__init__.__kwdefaults__, "steps": 5, "queries": 5}
    monkeypatch.setattr(AutoAttack.__init__, "__kwdefaults__", shortened)
    robust = autoattack.autoattack(model, images, labels, eps=0.0)
    assert torch.equal(robust, model(images).argmax(1) == labels)
    in_l2 = autoattack.autoattack(model, images, labels, eps=EPS_L2, norm="l2")
    beyond = autoattack.autoattack(model, images, labels, eps=EPS_L2)  # of every pixel
    assert int(beyond.sum()) < int(in_l2.sum()) < int(robust.sum())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm": "L2"}, "norm: 'L2'; give linf or l2"),
        ({"eps": 8}, "eps: 8; must be one radius on images in .0, 1., 8 / 255 is usual"),
        ({"eps": -0.1}, "eps: -0.1; must be"),
        ({"eps": float("nan")}, "eps: nan; must be"),
        ({"eps": -1.0, "norm": "l2"}, "eps: -1.0; must be .* 128 / 255 is usual"),
        ({"batch_size": 0}, "batch_size: 0; must be at least 1"),
        ({"images": torch.zeros(0, 3, 8, 8)}, "images: torch.float32 of shape .0, 3, 8, 8.; give"),
        ({"images": torch.zeros(4, 192)}, "images: torch.float32 of shape .4, 192.; give"),
        ({"images": torch.zeros(4, 3, 8, 8).double()}, "images: torch.float64 .* as torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "labels: torch.int64 of shape .3.; give"),
        ({"labels": torch.zeros(4, 1, dtype=torch.int64)}, "labels: torch.int64 of shape .4, 1."),
        ({"labels": torch.zeros(4, dtype=torch.int32)}, "labels: torch.int32 of shape .4.; give"),
        ({"images": 2 * torch.ones(4, 3, 8, 8)}, "images: pixels reach from 2 to 2; give them in"),
    ],
)
def test_what_fits_no_search_is_named(
    model: nn.Module, changes: dict[str, Any], named: str
) -> None:
    given = {"images": torch.rand(4, 3, 8, 8), "labels": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^{named}"):
        autoattack.autoattack(model, **{**given, **changes})


def test_pixels_of_every_batch_are_looked_at(model: nn.Module) -> None:
    images = torch.rand(4, 3, 8, 8)
    images[3] += 1
    with pytest.raises(ValueError, match="^images: pixels reach"):
        autoattack.autoattack(model, images, torch.zeros(4, dtype=torch.int64), batch_size=2)

"""The parts of AutoAttack against what the paper says and what can be reckoned by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from reat_fast.attack import Norm
from reat_fast.evaluation import apgd
from reat_fast.evaluation.ball import Ball
from reat_fast.evaluation.fab import fab, hyperplane_step
from reat_fast.evaluation.square import share_of, square
from reat_fast.evaluation.square_moves import _hill, moved_energy, recoloured, tiles
from reat_fast.evaluation.victim import Victim
from reat_fast.kernels import philox

EPS = 0.1


def test_step_sizes_are_checked_when_the_paper_says() -> None:
    # p_0 = 0, p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06), times 100.
    assert sorted(apgd._checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_steps_are_halved_under_the_two_conditions_of_the_paper() -> None:
    # Of 16 steps 12 have to raise the loss: then it stands after 13; or it was halved just before,
    # or its best loss is a new one.
    rises, was_halved = torch.tensor([12, 13, 13, 13]), torch.tensor([True, True, False, False])
    ones, zeros = torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    best_loss, checked_loss = torch.full((4,), 5.0), torch.tensor([5.0, 5.0, 5.0, 4.0])
    search = apgd._Search(
        *(torch.arange(4) for _ in range(3)),
        clean=zeros,
        adv=zeros,
        before=zeros,
        gradient=zeros,
        loss=torch.zeros(4),
        best=ones,
        best_gradient=ones,
        best_loss=best_loss,
        step_size=torch.ones(4),
        rises=rises,
        was_halved=was_halved,
        checked_loss=checked_loss,
    )
    apgd._halve_steps(search, 16)
    assert search.step_size.tolist() == [0.5, 1.0, 0.5, 1.0]
    assert search.was_halved.tolist() == [True, False, True, False]
    for values in (search.adv, search.gradient, search.loss / 5):
        assert values.flatten().tolist() == [1.0, 0.0, 1.0, 0.0]
    assert not search.rises.any() and search.checked_loss.tolist() == [5.0] * 4


def test_the_targeted_dlr_loss_by_hand() -> None:
    logits = torch.tensor([[4.0, 1.0, 3.0, 2.0, 0.0]]).double()
    found = apgd.targeted_dlr(logits, torch.tensor([0]), torch.tensor([2]))
    assert found.item() == pytest.approx(-(4 - 3) / (4 - (2 + 1) / 2))
    scaled = apgd.targeted_dlr(7 * logits + 3, torch.tensor([0]), torch.tensor([2]))
    assert scaled.item() == pytest.approx(found.item())


def test_the_step_to_a_hyperplane_is_the_smallest() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(40, 3, 4, 4, generator=generator).double().round(decimals=1)
    normal = torch.randn(40, 3, 4, 4, generator=generator).double()
    normal[:, 0, 0] = 0  # coordinates that do not matter stay
    inside = torch.rand(40, 3, 4, 4, generator=generator).double()
    offset = (normal * inside).flatten(1).sum(1)
    offset[0] = (normal[0] * points[0]).sum()  # already there
    step = hyperplane_step(points, normal, offset)
    reached = points + step
    assert reached.min() >= 0 and reached.max() <= 1 and not step[:, 0, 0].any()
    # Newton stops at steps of one part in a million.
    torch.testing.assert_close((normal * reached).flatten(1).sum(1), offset, rtol=0, atol=1e-5)
    # The size that plain bisection finds: each coordinate goes so far, or to its bound.
    gap = offset - (normal * points).flatten(1).sum(1)
    up = (normal > 0) == (gap > 0)[:, None, None, None]
    room = torch.where(up, 1 - points, points)
    low, high = torch.zeros(40).double(), torch.ones(40).double()
    for _ in range(60):
        middle = (low + high) / 2
        reach = (normal.abs() * room.minimum(middle[:, None, None, None])).flatten(1).sum(1)
        low, high = low.where(reach >= gap.abs(), middle), middle.where(reach >= gap.abs(), high)
    torch.testing.assert_close(step.abs().flatten(1).amax(1), high, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-25])  # whose square float32 does not hold
def test_the_step_in_l2_goes_along_the_normal_as_far_as_the_box_lets_it(scale: float) -> None:
    points, normal = torch.tensor([[0.5, 0.5, 0.9, 0.5]]), torch.tensor([[2.0, -1.0, 4.0, 0.0]])
    for gap, expected in ((0.42, [0.04, -0.02, 0.08, 0.0]), (0.9, [0.2, -0.1, 0.1, 0.0])):
        offset = (normal * points).sum(1) + gap
        step = hyperplane_step(points, scale * normal, scale * offset, "l2")
        torch.testing.assert_close(step, torch.tensor([expected]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_hyperplane_outside_the_box_is_met_at_the_nearest_corner(norm: Norm) -> None:
    points = torch.tensor([[0.2, 0.9, 0.5]])
    step = hyperplane_step(points, torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([10.0]), norm)
    torch.testing.assert_close(points + step, torch.tensor([[1.0, 0.0, 0.5]]))


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_without_a_gradient_there_is_no_step(norm: Norm) -> None:
    points, nothing = torch.rand(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    offset = torch.tensor([0.0, 1.0, -1.0])
    assert torch.equal(hyperplane_step(points, nothing, offset, norm), nothing)


def test_a_step_may_take_as_many_turns_as_there_are_bounds() -> None:
    rooms, weights = 2.0 ** -torch.arange(20).double(), 4.0 ** torch.arange(20).double()
    step = hyperplane_step(1 - rooms[None], weights[None], weights.sum()[None] - 0.125)
    torch.testing.assert_close(step, torch.cat([rooms.new_tensor([0.875]), rooms[1:]])[None])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_step_does_not_depend_on_the_others_of_its_batch(norm: Norm) -> None:
    """To the bit, among them one whose hyperplane misses the box and one that takes many turns."""
    generator = torch.Generator().manual_seed(2)
    points, inside = (torch.rand(30, 60, generator=generator) for _ in range(2))
    normal = torch.randn(30, 60, generator=generator)
    offset = (normal * inside).sum(1)
    offset[3] = 1e3
    normal[5] *= 4.0 ** torch.arange(60).remainder(9)
    offset[5] = (normal[5] * inside[5]).sum()
    together = hyperplane_step(points, normal, offset, norm)
    rows = (points.split(1), normal.split(1), offset.split(1))
    alone = [hyperplane_step(*row, norm) for row in zip(*rows, strict=True)]
    # A sum may be taken in another order for another shape; its last bit moves the step by as much.
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_that_is_no_number_stops_no_search(norm: Norm) -> None:
    """Of an image whose logits are numbers: the root of a zero has such a one."""

    def logits(images: Tensor) -> Tensor:
        lead = 5 + images.flatten(1).mean(1) + (images[:, 0, 0, 0] - 0.5).abs().sqrt()
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    images = torch.full((2, 1, 3, 3), 0.5)
    images[1, 0, 0, 0] = 0.25
    victim, labels = Chosen(logits), torch.zeros(2, dtype=torch.int64)
    victim.fooled = lambda images, labels: logits(images).argmax(1) != labels  # type: ignore[attr-defined]
    found = apgd.apgd(
        *(victim, images, labels, labels, 0 * images, apgd.cross_entropy),  # type: ignore[arg-type]
        eps=EPS,
        steps=5,
        norm=norm,
    )
    assert torch.equal(found, images) and all(tried.isfinite().all() for tried in victim.tried)
    assert (victim.tried[-1][1] != images[1]).any()


class Chosen:
    """Stand in for a victim: logits by a function, and no image is ever fooled."""

    def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
        self.logits = logits
        self.tried: list[Tensor] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.tried.append(images.detach())
        return self.logits(images)

    gradient = Victim.gradient

    def _recorded(self, images: Tensor) -> None:
        """Have no graph."""

    def confirmed(self, fooled: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros_like(fooled)


def test_fab_stays_where_there_is_no_gradient() -> None:
    victim = Chosen(lambda images: images.flatten(1)[:, :2] * 0 + torch.tensor([1.0, 0.0]))
    images, labels = torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)
    fab(victim, images, labels, labels + 1, eps=EPS, steps=3)  # type: ignore[arg-type]
    assert all(torch.allclose(tried, images) for tried in victim.tried)


def test_square_tries_what_its_counters_say() -> None:
    batch, channels, height, width, seed = 3, 3, 5, 8, 7
    torch.manual_seed(0)
    images = torch.rand(batch, channels, height, width, dtype=torch.float64)
    weights = torch.randn(images[0].shape, dtype=torch.float64)
    samples, labels = torch.tensor([4, 0, 9]), torch.zeros(batch, dtype=torch.int64)

    def logits(images: Tensor) -> Tensor:
        lead = 100 + (images * weights).sin().flatten(1).sum(1)
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    def words(epoch: int, count: int) -> Tensor:
        return philox.random_bits(seed, epoch, samples, philox.EVALUATION, count)

    victim, eps = Chosen(logits), 0.4  # some bounds are those of the box
    square(victim, images, labels, samples, eps=eps, seed=seed, queries=220)  # type: ignore[arg-type]
    low, high = (images - eps).clamp_min(0), (images + eps).clamp_max(1)
    up = philox.bernoulli(words(1000, channels * width), 0.5).view(batch, channels, 1, width)
    best = torch.where(up, high, low)
    assert torch.equal(victim.tried[0], best)
    least = logits(best)[:, 0]
    for query in range(220):
        halvings = (query > 10) + (query > 50) + (query > 200)
        side = min(max(round((0.8 / 2**halvings * height * width) ** 0.5), 1), height)
        drawn = words(1001 + query // 100, 400).view(batch, 100, 4)[:, query % 100]
        expected = best.clone()
        for k in range(batch):
            top = int(philox.integers(drawn[k, 0], height - side + 1))
            left = int(philox.integers(drawn[k, 1], width - side + 1))
            place = slice(top, top + side), slice(left, left + side)
            for channel in range(channels):
                ends = high if int(drawn[k, 2]) >> channel & 1 else low
                expected[(k, channel, *place)] = ends[(k, channel, *place)]
        assert torch.equal(victim.tried[1 + query], expected)
        margins = logits(expected)[:, 0]
        better = margins < least
        best[better], least[better] = expected[better], margins[better]


def test_the_step_to_a_hyperplane_is_the_packages() -> None:
    projections = pytest.importorskip("pyautoattack.fab_projections")
    generator = torch.Generator().manual_seed(1)
    points, inside = (torch.rand(50, 200, generator=generator).double() for _ in range(2))
    normal = torch.randn(50, 200, generator=generator).double()
    offset = (normal * inside).sum(1)
    expected = projections.projection_linf(points, normal, offset)
    # Newton stops at steps of one part in a million.
    torch.testing.assert_close(hyperplane_step(points, normal, offset), expected, rtol=2e-6, atol=0)
    expected = projections.projection_l2(points, normal, offset)
    step = hyperplane_step(points, normal, offset, "l2")
    # The package puts 1e-8 or so in place of what it divides by.
    torch.testing.assert_close(step, expected, rtol=2e-6, atol=1e-7)
    assert float((normal * (points + step)).sum(1).sub(offset).abs().max()) < 1e-5


def test_squares_have_the_sizes_of_autoattack_and_lie_inside() -> None:
    words = torch.randint(0, 2**32, (500, 4), generator=torch.Generator().manual_seed(0))
    for query, share in [(0, 0.8), (10, 0.8), (11, 0.4), (201, 0.1), (4001, 0.8 / 128)]:
        assert share_of(query) == pytest.approx(share)
        inside = moved(words, (500, 3, 32, 32), query)
        side = max(round((share * 32 * 32) ** 0.5), 1)
        assert (inside.flatten(1).sum(1) == side * side).all()
        touched = inside.any(0)[0]
        assert touched.any(0).all() and touched.any(1).all()  # the last row and column too
    assert (moved(words, (500, 1, 2, 2), 5000).flatten(1).sum(1) == 1).all()


def moved(words: Tensor, shape: tuple[int, ...], query: int) -> Tensor:
    """Return where Square changes an even image, bool [B, 1, H, W]."""
    clean = torch.full(shape, 0.5)
    changed = recoloured(clean, clean, words, share_of(query), Ball("linf", EPS)) != clean
    assert (changed == changed[:, :1]).all()
    return changed[:, :1]


@pytest.mark.parametrize(
    ("height", "width"), [(0, 5), (1, 1), (2, 5), (3, 3), (3, 5), (4, 9), (7, 7)]
)
def test_a_hill_is_the_sum_of_rings_that_the_paper_has(height: int, width: int) -> None:
    # eta^(h1, h2)_(r, s) = sum_k=0^M(r, s) 1 / (n + 1 - k)^2, with n = floor(h1 / 2) the rings of
    # the longer side and M the ring that (r, s) lies in, counted from outside.
    rings = max(height, width) // 2 + 1
    expected = torch.zeros(height, width).double()
    for k in range(rings):  # squares round the middle, the outermost last
        top, left = height // 2 - k, width // 2 - k
        box = slice(max(top, 0), top + 2 * k + 1), slice(max(left, 0), left + 2 * k + 1)
        expected[box] += 1 / (k + 1) ** 2
    torch.testing.assert_close(_hill(height, width), expected / expected.norm())


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 9, 14), (3, 14, 9), (2, 3, 3)])
def test_square_in_l2_begins_and_goes_on_at_the_radius(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    clean, ball = torch.full((40, *shape), 0.5, dtype=torch.float64), Ball("l2", 0.4)
    samples = torch.arange(40)

    def words(count: int) -> Tensor:
        return philox.random_bits(3, 1000, samples, philox.EVALUATION, count)

    begun = tiles(clean, words, ball)
    mixed = (begun * torch.rand(shape)).flatten(1).sum(1)
    assert len(mixed.unique()) == 40 or clean[0].numel() < 30
    on = begun
    for query in range(30):  # far from the ends of the box all energy stays
        torch.testing.assert_close(ball.length(on - clean), torch.full((40,), 0.4).double())
        on = moved_energy(clean, on, words(8 * (query + 1))[:, -8:], share_of(20 * query), ball)
    assert (on != begun).flatten(1).any(1).all()


def test_square_in_l2_tries_what_the_packages_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one image, for the package has one square for all, and draws from the same words."""
    package = pytest.importorskip("pyautoattack.square")
    # The package writes float32 by default.
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        ours, theirs = _square_in_l2(package)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(ours) == len(theirs) == 301
    assert len({float(image.sum()) for image in ours}) == 301
    # 1e-12 in the package's denominators, in each of 300 queries.
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-9)


def _square_in_l2(package: Any) -> tuple[list[Tensor], list[Tensor]]:
    queries, seed, eps, side = 300, 7, 0.5, 15
    torch.manual_seed(0)
    images = torch.rand(1, 3, side, side)
    weights = torch.randn(images[0].shape)
    sample, labels = torch.tensor([4]), torch.zeros(1, dtype=torch.int64)

    def logits(images: Tensor) -> Tensor:
        lead = 100 + (3 * images * weights).sin().flatten(1).sum(1)
        return torch.stack([lead, torch.zeros_like(lead)], 1)

    victim = Chosen(logits)
    square(victim, images, labels, sample, eps=eps, seed=seed, queries=queries, norm="l2")  # type: ignore[arg-type]

    def words(epoch: int, count: int) -> Tensor:
        return philox.random_bits(seed, epoch, sample, philox.EVALUATION, count)[0]

    # What the package draws, in its order: an eta with its coin and a sign per channel, or places.
    coins = philox.bernoulli(words(1000, 4 * 25), 0.5).view(4, 25)
    turns = [bool(coin) for coin in coins[0]]
    signs = [2.0 * coins[1:, tile] - 1 for tile in range(25)]
    places: list[Tensor] = []
    for query in range(queries):
        drawn = words(1001 + query // 100, 800).view(100, 8)[query % 100]
        places += [drawn[at] for at in (0, 1, 4, 5)]
        turns.append(bool(drawn[3] & 1))
        signs.append(2.0 * (drawn[2] >> torch.arange(3) & 1) - 1)
    tried: list[Tensor] = []

    def noting(images: Tensor) -> Tensor:
        tried.append(images.clone())
        return logits(images)

    class Served(package.SquareAttack):  # type: ignore[misc]
        def random_choice(self, shape: list[int]) -> Tensor:
            return signs.pop(0).view(1, 3, 1, 1)

        def random_int(self, low: int = 0, high: int = 1, shape: object = None) -> int:
            return int(philox.integers(places.pop(0), high - low + 1))  # the last row, too

        def eta(self, size: int) -> Tensor:
            with mock.patch.object(torch, "rand", lambda *_: torch.tensor([0.0])):
                hills = super().eta(size)
            return hills.T if turns.pop(0) else hills

    attack = Served(noting, norm="L2", n_queries=queries, eps=eps, resc_schedule=False)
    attack.init_hyperparam(images)
    attack.attack_single_run(images, labels)
    assert not places and not turns and not signs
    return victim.tried, tried

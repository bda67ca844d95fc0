"""Auto-PGD and FAB-T step by step: in float64 every image on the way is that of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from made_data import made_images
from torch import Tensor, nn

from reat_fast.attack import Norm
from reat_fast.evaluation import apgd
from reat_fast.evaluation.ball import Ball
from reat_fast.evaluation.fab import fab
from reat_fast.evaluation.victim import Victim, attacked

CLASSES, IMAGES = 6, 24
PACKAGE = {"linf": "Linf", "l2": "L2"}


@pytest.fixture(autouse=True)
def float64_everywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the packages compute in float64: they write float32 by name and by default."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Cubed(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return (1000 * logits) ** 3  # in L2 the package takes gradients below 1e-8 for none


def made_model(*last: nn.Module) -> nn.Module:
    """Make a smooth network: no gradient of a pixel is zero up to the sign of its rounding."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        head = nn.Linear(128, CLASSES)
    return nn.Sequential(*layers, nn.SiLU(), nn.Flatten(), head, *last).eval()


def made_batch(model: nn.Module, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, the classes the model sees in them, and those of a rank further down."""
    pixels = made_images(np.arange(IMAGES) % CLASSES, 3, seed=3)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() / 255
    order = model(images).argsort(1, descending=True)
    return images, order[:, 0], order[:, rank]


def noted(function: Callable[..., object], seen: list[Tensor]) -> Callable[..., object]:
    """Return the function, which then keeps the images it is called with."""

    def noting(images: Tensor, *others: object) -> object:
        seen.append(images.detach().clone())
        return function(images, *others)

    return noting


def let_none_leave(victim: Victim) -> list[Tensor]:
    """Keep all images in a search to its end; returns the list its images will be in."""
    seen: list[Tensor] = []
    victim.confirmed = lambda suspected, *_: torch.zeros_like(suspected)
    victim.gradient = noted(victim.gradient, seen)
    return seen


def counted_as_in_the_paper(
    seldom_rose: Callable[..., Tensor], begun: Tensor
) -> Callable[..., Tensor]:
    """Let the package's check count rises from where an image begins, and from its best after that.

    The package holds the first loss against 0, and the one after a halving against the last; the
    paper's images begin at the best then. begun: losses before the first step.
    """
    best_then, last, was_halved = begun, begun, torch.ones(len(begun), dtype=torch.bool)

    def counted(losses: Tensor, step: int, steps: int, best: Tensor, **share: float) -> Tensor:
        nonlocal best_then, last, was_halved
        losses = losses.clone()
        losses[step - steps] = last
        seldom = seldom_rose(losses, step, steps, best, **share)
        was_halved = seldom.bool() | (~was_halved & (best_then >= best))
        best_then, last = best.clone(), torch.where(was_halved, best, losses[step])
        return seldom

    return counted


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_auto_pgd_steps_where_the_packages_steps(name: str, norm: Norm) -> None:
    package = pytest.importorskip("pyautoattack.autopgd_base")
    eps = 1 / 8 if norm == "linf" else 1.0
    model = made_model()
    images, labels, targets = made_batch(model, rank=1)
    noise = 2 * torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) - 1
    noise = eps * noise if norm == "linf" else Ball(norm, eps).to_surface(noise)
    theirs: list[Tensor] = []
    kind = package.APGDAttack if name == "apgd-ce" else package.APGDAttack_targeted
    attack = kind(noted(model, theirs), n_iter=100, eps=eps, norm=PACKAGE[norm])
    attack.init_hyperparam(images)
    attack.y_target = targets
    objective = apgd.cross_entropy if name == "apgd-ce" else apgd.targeted_dlr
    begun = objective(model((images + noise).clamp(0, 1)), labels, targets)
    attack.check_oscillation = counted_as_in_the_paper(attack.check_oscillation, begun)
    if norm == "l2":  # the package adds 1e-12 to a length, which some of these gradients have
        attack.normalize = lambda moves: moves / moves.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    attack.attack_single_run(images, labels, x_init=images + noise)

    with attacked(model) as victim:
        ours = let_none_leave(victim)
        apgd.apgd(victim, images, labels, targets, noise, objective, eps=eps, norm=norm)
    assert len(ours) == len(theirs) == 101
    moves = torch.stack(ours).diff(dim=0).abs().flatten(2).amax(2)  # [100, N]
    # An image moves by 2 eps at most at first; towards the end its steps were halved often. In L2
    # eps is spread over 192 pixels.
    largest = eps if norm == "linf" else eps / 192**0.5
    assert moves[:5].amax(0).min() > largest / 2 and moves[90:].amin(0).max() < largest / 8
    # Steps are eps over powers of two: what is left is the rounding of a hundred sums. In L2
    # a step has the gradient's direction to its rounding, which the steps after it enlarge.
    atol = 1e-13 if norm == "linf" else 1e-9
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=atol)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("rank", [1, 3])
def test_fab_steps_where_the_packages_steps(rank: int, norm: Norm) -> None:
    package = pytest.importorskip("pyautoattack.fab_pt")
    # Cubes bend the boundary: steps that fall short of it are where the pull back is bounded.
    model = made_model(Cubed())
    images, labels, targets = made_batch(model, rank)
    theirs: list[Tensor] = []
    attack = package.FABAttack_PT(model, n_iter=30, targeted=True, eps=0.1, norm=PACKAGE[norm])
    attack.target_class = rank + 1
    attack.get_diff_logits_grads_batch_targeted = noted(
        attack.get_diff_logits_grads_batch_targeted, theirs
    )
    attack.attack_single_run(images, labels, is_targeted=True)
    with attacked(model) as victim:
        ours = let_none_leave(victim)
        fab(victim, images, labels, targets, eps=0.0, steps=30, norm=norm)
    assert len(ours) == len(theirs) == 30
    assert (ours[-1] != images).flatten(1).any(1).all()
    # Newton stops at steps of one part in a million of a step of at most 1.
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=1e-6)

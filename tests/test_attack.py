"""The attack: it equals the reference, keeps its promises and leaves the model alone."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import official_values as official
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reat_fast import reference
from reat_fast.attack import (
    PGD,
    Norm,
    SummedClassLoss,
    cross_entropy,
    l2_noise,
    of_length,
    pgd,
    uniform_noise,
)
from reat_fast.models import create_model
from reat_fast.networks.borrowed import with_batch_statistics
from reat_fast.objective import rbl_loss

EPS, STEP = 8 / 255, 2 / 255


@pytest.fixture
def made() -> dict[str, Tensor]:
    return official.inputs()


@pytest.fixture
def model() -> nn.Module:
    return official.TinyNetwork().eval()


def attack(model: nn.Module, made: dict[str, Tensor], **options: object) -> Tensor:
    settings = {"eps": EPS, "step_size": STEP, "steps": 10, "start": made["noise"][0], **options}
    return pgd(model, made["images"], made["labels"], **settings)  # type: ignore[arg-type]


def plain_pgd(
    model: nn.Module, made: dict[str, Tensor], loss: reference.AttackLoss, steps: int = 10
) -> Tensor:
    return reference.pgd(
        model,
        made["images"],
        made["labels"],
        eps=EPS,
        step_size=STEP,
        steps=steps,
        start=made["noise"][0],
        loss=loss,
    )


class Narrow:
    """Rounds its images to bfloat16, as a frozen network does, and says so, or does not."""

    def __init__(self, says: bool) -> None:
        torch.manual_seed(0)
        self.weight = torch.randn(8, 3 * 32 * 32).bfloat16()
        self.taken: list[torch.dtype] = []
        if says:
            self.images_dtype = torch.bfloat16

    def __call__(self, images: Tensor) -> Tensor:
        self.taken.append(images.dtype)
        return F.linear(images.to(torch.bfloat16).flatten(1), self.weight)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_gradient_as_narrow_as_the_network_moves_images_to_the_same_bits(norm: Norm) -> None:
    torch.manual_seed(1)
    images, labels = torch.rand(4, 3, 32, 32), torch.arange(4)
    results = []
    for says in (True, False):
        network, bad = Narrow(says), torch.zeros((), dtype=torch.int64)
        start = torch.zeros_like(images)
        found = pgd(network, images, labels, start=start, steps=3, norm=norm, nonfinite=bad)
        results.append(found)
        assert network.taken == [torch.bfloat16 if says else torch.float32] * 3 and bad == 0
    assert torch.equal(*results)
    # The images themselves stay as fine as they were.
    assert not torch.equal(results[0], results[0].bfloat16().float())


@pytest.mark.parametrize("named", [{}, {"offsets": 1.0}, {"weights": 2.0}])
def test_the_summed_class_loss_attacks_as_any_loss_of_its_values(
    model: nn.Module, made: dict[str, Tensor], named: dict[str, float]
) -> None:
    values = {name: value * torch.arange(1, 11) for name, value in named.items()}
    loss = SummedClassLoss(**values)
    found = attack(model, made, loss=loss)
    assert torch.equal(found, attack(model, made, loss=lambda z, y: loss(z, y)))


def test_rbl_cannot_change_an_adversarial_example(
    model: nn.Module, made: dict[str, Tensor]
) -> None:
    weights = torch.from_numpy(reference.rbl_weights(official.COUNTS, official.AE_COUNTS))
    assert weights.max() / weights.min() > 1e7
    plain = plain_pgd(model, made, lambda z, y: F.cross_entropy(z, y, reduction="sum"))
    # In float64 no gradient underflows next to a weight of 1e-7, so the two agree in every pixel.
    double = {name: t.double() if t.is_floating_point() else t for name, t in made.items()}
    wide = model.double()
    weighted = plain_pgd(wide, double, lambda z, y: reference.rbl_loss(z, y, weights))
    unweighted = plain_pgd(wide, double, lambda z, y: F.cross_entropy(z, y, reduction="sum"))
    assert torch.equal(weighted, unweighted)
    assert plain.shape == weighted.shape


def test_pgd_equals_the_reference_bit_for_bit(model: nn.Module, made: dict[str, Tensor]) -> None:
    expected = plain_pgd(model, made, lambda z, y: F.cross_entropy(z, y, reduction="sum"))
    assert torch.equal(attack(model, made), expected)


def test_result_lies_in_the_ball_and_in_the_range(
    model: nn.Module, made: dict[str, Tensor]
) -> None:
    adv = attack(model, made)
    assert float(adv.min()) >= 0 and float(adv.max()) <= 1
    # adv and the clean image are rounded to float32 once each: an ulp of 1 is 6e-8.
    assert float((adv - made["images"]).abs().max()) <= EPS + 1.2e-7
    before = cross_entropy(model(made["images"]), made["labels"])
    assert float(cross_entropy(model(adv), made["labels"])) > float(before)


def test_radius_and_step_per_sample_equal_one_call_per_sample(
    model: nn.Module, made: dict[str, Tensor]
) -> None:
    radii = torch.linspace(0, 16 / 255, len(made["labels"]))
    together = attack(model, made, eps=radii, step_size=radii / 4)
    for b in (0, 7, 23):
        single = {name: t[b : b + 1] for name, t in made.items() if name != "noise"}
        single["noise"] = made["noise"][:, b : b + 1]
        alone = attack(model, single, eps=float(radii[b]), step_size=float(radii[b] / 4))
        torch.testing.assert_close(together[b : b + 1], alone, rtol=0, atol=1e-6)


def test_zero_radius_returns_the_clean_images(model: nn.Module, made: dict[str, Tensor]) -> None:
    zero = torch.zeros_like(made["images"])
    assert torch.equal(attack(model, made, eps=0.0, start=zero), made["images"])


def test_zero_steps_return_the_start_inside_the_range(
    model: nn.Module, made: dict[str, Tensor]
) -> None:
    expected = (made["images"] + made["noise"][0]).clamp(0, 1)
    assert torch.equal(attack(model, made, steps=0), expected)
    plain = plain_pgd(model, made, F.cross_entropy, steps=0)
    assert torch.equal(plain, expected)


def test_images_of_another_range_are_attacked_in_it(made: dict[str, Tensor]) -> None:
    # In float64 no sign turns by the rounding of the change of range, and no pixel by more.
    model = official.TinyNetwork().eval().double()
    made = {name: t.double() if t.is_floating_point() else t for name, t in made.items()}
    for steps in (0, 3):
        expected = 2 * attack(model, made, steps=steps) - 1
        found = pgd(
            lambda images: model((images + 1) / 2),
            2 * made["images"] - 1,
            made["labels"],
            eps=2 * EPS,
            step_size=2 * STEP,
            steps=steps,
            start=2 * made["noise"][0],
            clip=(-1.0, 1.0),
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_gradients_switched_off_by_the_caller_are_on_in_the_attack(
    model: nn.Module, made: dict[str, Tensor]
) -> None:
    expected = attack(model, made, steps=2)
    with torch.no_grad():
        assert torch.equal(attack(model, made, steps=2), expected)


def test_the_random_start_is_uniform_in_the_ball_of_each_image() -> None:
    torch.manual_seed(0)
    images = torch.zeros(3, 3, 32, 32)
    unit = uniform_noise(images, 0.5) / 0.5
    # Five standard errors of the mean and of the mean square of 9,216 numbers in U(-1, 1).
    assert abs(float(unit.mean())) < 5 * (1 / 3 / 9216) ** 0.5
    assert abs(float(unit.square().mean()) - 1 / 3) < 5 * (4 / 45 / 9216) ** 0.5
    assert float(unit.abs().max()) <= 1
    radii = torch.tensor([0.0, 0.25, 1.0])
    torch.manual_seed(0)
    assert torch.equal(uniform_noise(images, radii), unit * radii.view(-1, 1, 1, 1))


def test_weights_get_no_gradient_and_modes_stay(made: dict[str, Tensor]) -> None:
    model = official.TinyNetwork().train()
    model.bn.eval()
    statistics = model.bn.running_mean.clone() if model.bn.running_mean is not None else None
    adv = PGD(model, eps=EPS, alpha=STEP, steps=2)(made["images"], made["labels"])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and model.conv.training and not model.bn.training
    assert torch.equal(model.bn.running_mean, statistics)  # type: ignore[arg-type]
    assert not adv.requires_grad


def test_batch_statistics_leave_the_running_ones_alone_and_let_rbl_act(
    made: dict[str, Tensor],
) -> None:
    model = official.TinyNetwork().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    network = with_batch_statistics(model)
    torch.testing.assert_close(network(made["images"]), F_train(model, made["images"]))
    weights = torch.tensor(official.RBL_WEIGHTS)

    def attacked(loss: reference.AttackLoss) -> Tensor:
        return pgd(
            network, made["images"], made["labels"], steps=3, start=made["noise"][0], loss=loss
        )

    weighted = attacked(lambda z, y: rbl_loss(z, y, weights))
    assert not torch.equal(weighted, attacked(cross_entropy))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def F_train(model: official.TinyNetwork, images: Tensor) -> Tensor:
    """The network on batch statistics, written out."""
    hidden = model.conv(images)
    hidden = F.batch_norm(hidden, None, None, model.bn.weight, model.bn.bias, training=True)
    return model.fc(F.relu(hidden).mean((2, 3)))


def test_an_attack_without_gradients_is_refused(made: dict[str, Tensor]) -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        attack(official.TinyNetwork().eval(), made, steps=1)


def test_radii_in_float64_give_the_images_of_the_same_radii_in_float32() -> None:
    model, images, labels = official.TinyNetwork().eval(), torch.rand(4, 3, 8, 8), torch.arange(4)
    found = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        found.append(pgd(model, images, labels, eps=torch.full((4,), EPS, dtype=dtype), steps=1))
    assert found[0].dtype == torch.float32 and torch.equal(*found)


def test_nonfinite_gradients_are_counted(made: dict[str, Tensor]) -> None:
    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits * float("nan")).sum()

    count = torch.zeros((), dtype=torch.int64)
    adv = attack(official.TinyNetwork().eval(), made, steps=2, loss=broken, nonfinite=count)
    assert int(count) == 2 * made["images"].numel()
    assert bool(adv.isfinite().all())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)}, "images: torch.uint8; divide"),
        ({"images": torch.rand(2, 3, 8, 8) * 255}, "images: pixels reach from"),
        ({"images": torch.rand(2, 3, 8, 8) - 0.5}, "images: pixels reach from -0."),
        ({"images": torch.full((2, 3, 8, 8), torch.nan)}, "images: pixels reach from nan"),
        ({"labels": torch.tensor([0, -1])}, "labels: -1; must be classes"),
        ({"labels": torch.tensor([0])}, "labels: 1 of them for 2 images"),
        ({"eps": -1 / 255}, "eps: -0.0039"),
        ({"eps": 8}, "eps: 8; must lie in [0, 1], as images do; 8/255 is usual"),
        ({"eps": torch.full((3,), 0.1)}, "eps has shape (3,): give a number or a tensor"),
        ({"alpha": torch.nan}, "step_size: nan; must be a number, 0 or more"),
        ({"steps": -1}, "steps: -1"),
        ({"steps": 10.0}, "steps: 10.0; must be a whole number, 0 or more"),
        ({"eps": "8/255"}, "eps: '8/255'; must be a number, 0 or more"),
        ({"images": np.zeros((2, 3, 8, 8))}, "images: a ndarray; give a tensor"),
        ({"labels": [0, 1]}, "labels: a list; give a tensor, one label an image"),
        (
            {"images": torch.full((2, 3, 8, 8), 1 + 2.0**-23)},
            "images: pixels reach from 1.00000012 to 1.00000012",
        ),
    ],
)
def test_what_would_mean_nothing_is_refused(changes: dict[str, Any], named: str) -> None:
    given = {"images": torch.rand(2, 3, 8, 8), "labels": torch.tensor([0, 1]), **changes}
    images, labels = given.pop("images"), given.pop("labels")
    model = create_model("resnet8", 5, width=8)
    with pytest.raises(ValueError, match=re.escape(named)):
        PGD(model, **given)(images, labels)
    assert model.training


@pytest.mark.parametrize(("eps", "clip"), [(1.0, (0.0, 1.0)), (1.5, (-1.0, 1.0))])
def test_a_radius_may_be_as_wide_as_what_images_lie_in(
    eps: float, clip: tuple[float, float]
) -> None:
    images = torch.zeros(2, 3, 4, 4)
    start, labels = torch.zeros_like(images), torch.tensor([0, 1])
    adv = pgd(nn.Flatten(), images, labels, eps=eps, step_size=eps, steps=1, start=start, clip=clip)
    assert adv.min() == max(-eps, clip[0]) and adv.max() == min(eps, clip[1])


def test_a_length_in_l2_may_be_beyond_what_a_pixel_can_move() -> None:
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    given = {"eps": 3.0, "step_size": 3.0, "steps": 1, "start": torch.zeros_like(images)}
    adv = pgd(nn.Flatten(), images, labels, norm="l2", loss=lambda x, _: x.sum(), **given)  # type: ignore[arg-type]
    torch.testing.assert_close(adv.flatten(1).norm(dim=1), torch.tensor([3.0, 3.0]))


def test_the_object_works_in_inference_mode_and_on_no_images() -> None:
    model = create_model("resnet8", 5, width=8)
    attack = PGD(model, steps=2, random_start=False)
    expected = attack(torch.full((1, 3, 8, 8), 0.5), torch.ones(1).long())
    with torch.inference_mode():
        images = torch.full((1, 3, 8, 8), 0.5)
        found = attack(images, torch.ones(1).long())
    assert torch.equal(found, expected) and not torch.equal(found, images)
    assert attack(torch.rand(0, 3, 8, 8), torch.ones(0).long()).shape == (0, 3, 8, 8)


def test_images_of_any_strides_are_attacked_like_their_copies(
    model: nn.Module, made: dict[str, Tensor]
) -> None:
    images, labels = made["images"], made["labels"]
    for strided in (
        images.transpose(2, 3),
        images.flip(0)[::1].transpose(2, 3),
        images[:, [0] * 3],
    ):
        start = torch.zeros(strided.shape)
        found = pgd(model, strided, labels, start=start, steps=2)
        assert torch.equal(found, pgd(model, strided.contiguous(), labels, start=start, steps=2))
    narrow = torch.rand(4, 3, 8, 16)[..., ::2]
    assert pgd(lambda x: x.flatten(1), narrow, torch.arange(4), steps=1).shape == narrow.shape


def test_in_l2_the_result_and_its_start_lie_in_the_ball(
    model: nn.Module, made: dict[str, Tensor]
) -> None:
    images, labels = made["images"].double().clamp(0.3, 0.7), made["labels"]
    model = model.double()
    radii = torch.linspace(0.1, 1.0, len(images), dtype=torch.float64)
    torch.manual_seed(0)
    noise = l2_noise(images, radii).flatten(1).norm(dim=1)
    assert (noise <= radii).all() and (noise > 0.9 * radii).all()  # so many dimensions: at the edge
    adv = pgd(model, images, labels, eps=radii, step_size=0.1, steps=10, norm="l2")
    lengths = (adv - images).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, radii)  # reached by so many steps
    before = cross_entropy(model(images), labels)
    assert cross_entropy(model(adv), labels).item() > before.item()
    with pytest.raises(ValueError, match="^norm: 'l1'; give one of linf, l2$"):
        pgd(model, images, labels, norm="l1")  # type: ignore[arg-type]


def test_the_start_that_pgd_draws_fills_the_ball_of_its_norm(model: nn.Module) -> None:
    images, labels = torch.full((4000, 1, 1, 3), 0.5), torch.zeros(4000, dtype=torch.int64)
    torch.manual_seed(0)
    in_l2 = pgd(model, images, labels, eps=0.3, steps=0, norm="l2") - images
    share = in_l2.flatten(1).norm(dim=1) / 0.3
    # Of a ball in three dimensions the share r holds r^3; 5 sigma of 4000 draws are 0.04.
    for radius in (0.3, 0.5, 0.8):
        assert abs((share < radius).float().mean().item() - radius**3) < 0.04
    in_linf = pgd(model, images, labels, eps=0.3, steps=0) - images
    corners = (in_linf.abs() > 0.2).flatten(1).all(1).float().mean().item()
    assert abs(corners - 1 / 27) < 0.02 and in_linf.abs().max() <= 0.3 + 1e-6


def test_no_noise_has_no_direction_and_no_image_no_ball() -> None:
    assert torch.equal(of_length(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))
    assert l2_noise(torch.zeros(0, 3, 4, 4), 1.0).shape == (0, 3, 4, 4)


class HasNamesOfOurs(nn.Module):
    """Has methods that frozen networks have, for something else."""

    images_dtype = torch.float16

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :4]

    def input_gradient(self, *given: Any) -> Tensor:
        raise AssertionError("the owner's, for something else")


def test_methods_of_a_network_are_its_owners_whatever_they_are_called() -> None:
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([0, 3])
    adv = pgd(HasNamesOfOurs(), images, labels, steps=2)
    assert adv.dtype == torch.float32 and not torch.equal(adv, images)

"""Policies against torchvision's definitions, written out for one Pillow image at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from reat_fast.engine.augment import (
    AUTOAUGMENT,
    PolicyName,
    _choices,
    _magnitude,
    _policy,
    apply_policy,
)
from reat_fast.kernels import philox
from reat_fast.kernels.augment import OPERATIONS, Numbers, numbers, operate
from reat_fast.kernels.policy import drawn
from reat_fast.kernels.prepare import prepare
from reat_fast.kernels.triton_support import Backend

# Names in the order of torchvision's RandAugment, which has no Invert.
NAMES = (
    *("Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color"),
    *("Contrast", "Sharpness", "Posterize", "Solarize", "AutoContrast", "Equalize"),
)
UNSIGNED = ("Identity", "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert")
PUBLISHED = """
Invert 0.1 0, Contrast 0.2 6; Rotate 0.7 2, TranslateX 0.3 9; Sharpness 0.8 1, Sharpness 0.9 3;
ShearY 0.5 8, TranslateY 0.7 9; AutoContrast 0.5 0, Equalize 0.9 0; ShearY 0.2 7, Posterize 0.3 7;
Color 0.4 3, Brightness 0.6 7; Sharpness 0.3 9, Brightness 0.7 9; Equalize 0.6 0, Equalize 0.5 0;
Contrast 0.6 7, Sharpness 0.6 5; Color 0.7 7, TranslateX 0.5 8; Equalize 0.3 0, AutoContrast 0.4
0; TranslateY 0.4 3, Sharpness 0.2 6; Brightness 0.9 6, Color 0.2 8; Solarize 0.5 2, Invert 0.0 0;
Equalize 0.2 0, AutoContrast 0.6 0; Equalize 0.2 0, Equalize 0.6 0; Color 0.9 9, Equalize 0.6 0;
AutoContrast 0.8 0, Solarize 0.2 8; Brightness 0.1 3, Color 0.7 0; Solarize 0.4 5, AutoContrast
0.9 0; TranslateY 0.9 9, TranslateY 0.7 9; AutoContrast 0.9 0, Solarize 0.8 3; Equalize 0.8 0,
Invert 0.1 0; TranslateY 0.7 9, AutoContrast 0.9 0
"""
SHAPES = [(32, 32, 3), (28, 28, 1), (19, 40, 3), (5, 7, 1), (2, 3, 3), (1, 1, 3)]


def made_images(count: int, height: int, width: int, channels: int) -> Tensor:
    """Make noise, ramps, few levels, one level, low contrast and a lone bright pixel in turn."""
    generator = torch.Generator().manual_seed(0)
    shape = (height, width, channels)
    images = []
    for position in range(count):
        noise = torch.randint(0, 256, shape, generator=generator)
        across = torch.arange(width)[None, :, None] * 200 // width
        ramp = torch.arange(height)[:, None, None] * 2 + across + noise % 7
        lone = torch.zeros(shape, dtype=torch.int64)
        lone[height // 2, width // 2] = noise[0, 0]
        kinds = (noise, ramp, noise // 100 * 90, noise[:1, :1].expand(shape), 99 + noise % 9, lone)
        images.append(kinds[position % len(kinds)].clamp(0, 255).to(torch.uint8))
    return torch.stack(images)


def magnitude_of(name: str, place: int, bins: int, height: int, width: int) -> float:
    spaces = {
        **dict.fromkeys(("ShearX", "ShearY"), (0.0, 0.3)),
        "TranslateX": (0.0, 150.0 / 331.0 * width),
        "TranslateY": (0.0, 150.0 / 331.0 * height),
        "Rotate": (0.0, 30.0),
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.0, 0.9)),
        "Solarize": (1.0, 0.0),
    }
    if name == "Posterize":
        return int((8 - torch.arange(bins) / ((bins - 1) / 4)).round()[place])
    if name not in spaces:
        return 0.0
    value = float(torch.linspace(*spaces[name], bins)[place])
    return 255.0 * value if name == "Solarize" else value


def by_pillow(image: Image.Image, name: str, magnitude: float) -> Image.Image:
    """Do one operation as torchvision does to a Pillow image."""
    match name:
        case "ShearX" | "ShearY" | "TranslateX" | "TranslateY":
            forward = np.eye(3)
            down = int(name.endswith("Y"))
            if name.startswith("Shear"):
                forward[down, 1 - down] = -math.tan(math.atan(magnitude))
            else:
                forward[down, 2] = int(magnitude)
            matrix = tuple(np.linalg.inv(forward)[:2].flatten().tolist())
            return image.transform(image.size, Image.Transform.AFFINE, matrix)
        case "Rotate":
            return image.rotate(magnitude)
        case "Brightness" | "Color" | "Contrast" | "Sharpness":
            return getattr(ImageEnhance, name)(image).enhance(1.0 + magnitude)
        case "Posterize":
            return ImageOps.posterize(image, int(magnitude))
        case "Solarize":
            return ImageOps.solarize(image, magnitude)
        case "AutoContrast" | "Equalize" | "Invert":
            return getattr(ImageOps, name.lower())(image)
        case _:
            return image


def done_by_pillow(image: Tensor, steps: list[tuple[str, float]]) -> Tensor:
    picture = Image.fromarray(image.squeeze(2).numpy())
    for name, magnitude in steps:
        picture = by_pillow(picture, name, magnitude)
    return torch.from_numpy(np.array(picture)).view_as(image)


def drawn_by_hand(
    name: PolicyName,
    index: int,
    seed: int,
    epoch: int,
    ops: int,
    magnitude: int,
    height: int,
    width: int,
) -> list[tuple[str, float]]:
    """Draw a sample's operations and signed magnitudes, word by word."""
    rounds, count, bins = (ops, 3, 31) if name == "randaugment" else (1, 5, 10)
    words = philox.random_bits(
        seed, epoch, torch.tensor([index]), philox.POLICY, rounds * count
    ).tolist()[0]
    drawn = []
    for first in range(0, rounds * count, count):
        if name == "randaugment":
            steps: tuple[tuple[str, float, int], ...]
            steps = ((NAMES[words[first] * len(NAMES) >> 32], 1.0, magnitude),)
        else:
            steps = AUTOAUGMENT[words[first] * len(AUTOAUGMENT) >> 32]
        signs = words[first + 1 : first + 1 + len(steps)]
        chances = words[first + 1 + len(steps) : first + count]
        for (operation, probability, place), sign, chance in zip(
            steps, signs, chances, strict=True
        ):
            value = magnitude_of(operation, place, bins, height, width)
            if sign < 2**31 and operation not in UNSIGNED:
                value = -value
            if chance / 2**32 < probability:
                drawn.append((operation, value))
    return drawn


def sizes(images: Tensor) -> tuple[int, int]:
    return images.shape[1], images.shape[2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_pillows_to_the_bit(name: str, shape: tuple[int, int, int]) -> None:
    images = made_images(6, *shape)
    values = []
    for bins, place in [(31, 0), (31, 8), (31, 9), (31, 30), (10, 3), (10, 7)]:
        value = magnitude_of(name, place, bins, *sizes(images))
        values += [value] if name in UNSIGNED else [value, -value]
    expected = [done_by_pillow(image, [(name, value)]) for value in values for image in images]
    rows = [numbers(name, value, *sizes(images)) for value in values]
    columns = (torch.tensor(column) for column in zip(*rows, strict=True))
    rows_of_images = Numbers(*(column.repeat_interleave(6, 0) for column in columns))
    pixels = images.permute(0, 3, 1, 2).float().repeat(len(values), 1, 1, 1)
    found = operate(pixels, rows_of_images._replace(lookup=rows_of_images.lookup.float()))
    assert torch.equal(found.permute(0, 2, 3, 1), torch.stack(expected).float())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("policy", "num_ops", "magnitude"),
    [("autoaugment", 2, 9), ("randaugment", 2, 8), ("randaugment", 3, 30), ("randaugment", 1, 0)],
)
def test_a_policy_does_what_torchvision_does_to_each_image(
    policy: PolicyName, num_ops: int, magnitude: int, shape: tuple[int, int, int]
) -> None:
    images = made_images(60, *shape)
    indices = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:50]
    found = apply_policy(images, indices, 11, 4, policy, num_ops=num_ops, magnitude=magnitude)
    assert found.dtype == torch.uint8 and found.shape == (50, *shape) and found.is_contiguous()
    for image, index in zip(found, indices.tolist(), strict=True):
        steps = drawn_by_hand(policy, index, 11, 4, num_ops, magnitude, *sizes(images))
        assert torch.equal(image, done_by_pillow(images[index], steps)), (index, steps)


@pytest.mark.parametrize("bins", [10, 31])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_place_has_the_magnitude_of_torchvision(name: str, bins: int) -> None:
    for place in range(bins):
        expected = magnitude_of(name, place, bins, 19, 40)
        assert _magnitude(name, place, bins, 19, 40) == expected


def test_the_policy_of_autoaugment_is_the_published_one() -> None:
    subpolicies = "; ".join(
        ", ".join(f"{name} {probability} {place}" for name, probability, place in steps)
        for steps in AUTOAUGMENT
    )
    assert subpolicies == " ".join(PUBLISHED.split())


@pytest.mark.parametrize("name", ["randaugment", "autoaugment"])
def test_operations_signs_and_chances_come_as_often_as_they_should(name: PolicyName) -> None:
    count = 200_000
    policy = _policy(name, 2, 9)
    choices = _choices(policy, 32, 32, torch.device("cpu"))
    limits, rows = choices.limits, choices.rows
    rows_drawn = drawn(choices, 3, 1, torch.arange(count))
    assert rows_drawn.shape == (count, 2)
    steps = [step for subpolicy in policy.subpolicies for step in subpolicy]
    if name == "randaugment":
        expected = {(slot, row): 1 / 28 for slot in (0, 1) for row in range(1, 29)}
    else:  # row 1 + 2 * step + sign, steps of a subpolicy in turn
        expected = {
            (place % 2, 1 + 2 * place + sign): probability / 50
            for place, (_, probability, _) in enumerate(steps)
            for sign in (0, 1)
        }
    for slot in (0, 1):
        counts = torch.bincount(rows_drawn[:, slot], minlength=len(limits)).tolist()
        for row in range(1, len(limits)):
            share = expected.get((slot, row), 0.0)
            # Five standard deviations of a binomial: with other seeds, one of the 156 shares would
            # be further off in one run of 10^4.
            spread = 5 * math.sqrt(count * share * (1 - share))
            assert abs(counts[row] - count * share) <= spread, (slot, row)
    for place, (operation, _, bin_) in enumerate(steps):
        low, high = 1 + 2 * place, 2 + 2 * place
        assert [OPERATIONS[code] for code in rows.operation[low : high + 1]] == [operation] * 2
        if operation in ("ShearX", "ShearY", "Rotate", "TranslateX", "TranslateY") and bin_:
            assert not torch.equal(rows.matrix[low], rows.matrix[high])
        if operation in ("Brightness", "Color", "Contrast", "Sharpness"):
            assert float(rows.factor[low] + rows.factor[high]) == pytest.approx(2)


@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
def test_a_sample_is_augmented_alike_in_any_batch(policy: PolicyName) -> None:
    images = made_images(24, 16, 16, 3)
    whole = apply_policy(images, torch.arange(24), 7, 2, policy)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))
    epoch, seed = torch.tensor(2), torch.tensor(7)
    assert torch.equal(apply_policy(images, order, seed, epoch, policy), whole[order])
    for part in order.split(7):
        alone = apply_policy(images[part], part, 7, 2, policy, gather=False)
        assert torch.equal(alone, whole[part])
    assert not torch.equal(apply_policy(images, torch.arange(24), 7, 3, policy), whole)
    assert not torch.equal(apply_policy(images, torch.arange(24), 8, 2, policy), whole)
    nothing = apply_policy(images, torch.arange(0), 7, 2, policy)
    assert nothing.shape == (0, 16, 16, 3)


def test_crop_and_flip_come_after_the_policy() -> None:
    images = made_images(12, 32, 32, 3)
    indices = torch.arange(12)
    augmented = apply_policy(images, indices, 5, 1, "randaugment", magnitude=8)
    clean, start = prepare(augmented, indices, 5, 1, 8 / 255, gather=False)
    by_hand = torch.stack(
        [
            done_by_pillow(image, drawn_by_hand("randaugment", index, 5, 1, 2, 8, 32, 32))
            for index, image in enumerate(images)
        ]
    )
    expected = prepare(by_hand, indices, 5, 1, 8 / 255, gather=False)
    assert torch.equal(clean, expected[0]) and torch.equal(start, expected[1])


@pytest.mark.usefixtures("forbid_syncs")
@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
def test_a_policy_never_waits_for_its_device(policy: PolicyName) -> None:
    images, indices = made_images(8, 9, 11, 3), torch.tensor([5, 2, 2])
    apply_policy(images, indices, torch.tensor(0), torch.tensor(0), policy)


def test_what_a_policy_cannot_take_is_refused_in_one_line() -> None:
    images, indices = made_images(4, 8, 8, 3), torch.arange(4)
    wrong: list[tuple[str, dict[str, object]]] = [
        ("images are torch.float32", {"images": images.float()}),
        ("images are not contiguous", {"images": images.mT}),
        ("C = 1 or 3", {"images": images[..., :2].contiguous()}),
        ("indices are torch.int32", {"indices": indices.int()}),
        ("3 images and 4 indices", {"images": images[:3], "gather": False}),
        ("randaugment or autoaugment", {"name": "augmix"}),
        ("num_ops=0", {"num_ops": 0}),
        ("magnitude=31", {"magnitude": 31}),
        ("magnitude=-1", {"magnitude": -1}),
        ("epoch has shape", {"epoch": indices}),
    ]
    for message, change in wrong:
        given = {"images": images, "indices": indices, "name": "randaugment", "epoch": 0, **change}
        with pytest.raises(ValueError, match=message) as error:
            apply_policy(seed=0, **given)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (64, 64, 3)], ids=str)
@pytest.mark.parametrize("policy", ["randaugment", "autoaugment"])
def test_a_gpu_and_the_replay_of_a_graph_give_the_bits_of_the_cpu(
    policy: PolicyName, shape: tuple[int, int, int], backend: Backend
) -> None:
    images = made_images(300, *shape)
    on_gpu, epoch = images.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    indices = torch.arange(300, device="cuda")
    for _ in range(2):
        apply_policy(on_gpu, indices, 3, epoch, policy, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = apply_policy(on_gpu, indices, 3, epoch, policy, backend=backend)
    for number in (1, 2):
        epoch.fill_(number)
        graph.replay()
        expected = apply_policy(images, torch.arange(300), 3, number, policy)
        assert torch.equal(captured.cpu(), expected)
        eager = apply_policy(on_gpu, indices, 3, epoch, policy, backend=backend)
        assert torch.equal(eager.cpu(), expected)

"""The batch against a pad, slice and flip by hand; the same numbers however the batch is formed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from reat_fast.kernels import philox
from reat_fast.kernels.prepare import _prepare, prepare, prepare_torch
from reat_fast.kernels.triton_support import Backend

Place = tuple[Backend, str]
EPS = 8 / 255


def random_images(count: int, height: int, width: int, channels: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, height, width, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).to(device)


def by_hand(
    images: Tensor, indices: Tensor, seed: int, epoch: int, padding: int, flip: bool
) -> Tensor:
    """Crop and flip one image after the other, as torchvision does: RandomCrop, then flip."""
    height, width = images.shape[1:3]
    words = philox.random_bits(seed, epoch, indices, philox.AUGMENT, 3).tolist()
    batch = []
    for index, (down, right, mirror) in zip(indices.tolist(), words, strict=True):
        image = np.pad(images[index].numpy(), ((padding, padding), (padding, padding), (0, 0)))
        top, left = (word * (2 * padding + 1) >> 32 for word in (down, right))
        image = image[top : top + height, left : left + width]
        batch.append(image[:, ::-1] if flip and mirror < 2**31 else image)
    stacked = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
    return stacked.to(torch.float32) / 255


@pytest.mark.parametrize(
    ("shape", "padding", "flip"),
    [
        ((32, 32, 3), 4, True),
        ((32, 32, 3), 0, False),
        ((28, 28, 1), 2, True),
        ((5, 7, 3), 9, True),  # a crop may see padding only
        ((3, 5, 2), 0, True),
        ((1, 1, 1), 1, False),
    ],
)
def test_clean_is_the_crop_and_flip_by_hand(
    place: Place, shape: tuple[int, int, int], padding: int, flip: bool
) -> None:
    backend, device = place
    images = random_images(9, *shape, device)
    indices = torch.tensor([8, 0, 3, 3, 5], device=device)
    clean, start = prepare(
        images, indices, 11, 4, EPS, padding=padding, flip=flip, backend=backend, block=1024
    )
    expected = by_hand(images.cpu(), indices.cpu(), 11, 4, padding, flip)
    assert torch.equal(clean.cpu(), expected)
    for batch in (clean, start):
        assert batch.dtype == torch.float32 and batch.shape == (5, shape[2], *shape[:2])
        assert batch.is_contiguous(memory_format=torch.channels_last)


def test_every_byte_is_divided_to_the_bit(place: Place) -> None:
    backend, device = place
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1)
    one, settings = torch.zeros(1, dtype=torch.int64), {"padding": 0, "flip": False}
    clean, _ = prepare(image.to(device), one.to(device), 0, 0, EPS, **settings, backend=backend)  # type: ignore[arg-type]
    assert torch.equal(clean.cpu().flatten(), torch.arange(256, dtype=torch.float32) / 255)


def test_many_samples_draw_the_crops_and_flips_by_hand(place: Place) -> None:
    backend, device = place
    images = random_images(1, 3, 4, 1, device).expand(200, -1, -1, -1).contiguous()
    indices = torch.arange(200, device=device)
    clean, _ = prepare(
        images, indices, 5, 0, 0.0, padding=1, noise="none", backend=backend, block=16
    )
    assert torch.equal(clean.cpu(), by_hand(images.cpu(), indices.cpu(), 5, 0, 1, True))


def test_every_byte_becomes_its_exact_quotient(place: Place) -> None:
    backend, device = place
    images = torch.arange(256, dtype=torch.uint8, device=device).view(1, 16, 16, 1)
    index = torch.zeros(1, dtype=torch.int64, device=device)
    clean, _ = prepare(images, index, 0, 0, 0.0, padding=0, flip=False, backend=backend)
    assert torch.equal(clean.cpu().flatten(), torch.arange(256, dtype=torch.float32) / 255)


@pytest.mark.parametrize("noise", ["uniform", "normal"])
@pytest.mark.parametrize("shape", [(32, 32, 3), (5, 7, 3), (1, 1, 1)])
def test_start_is_clean_plus_the_words_of_its_purpose(
    place: Place, noise: Any, shape: tuple[int, int, int]
) -> None:
    backend, device = place
    images = random_images(6, *shape, device)
    indices = torch.tensor([5, 1, 0], device=device)
    size = math.prod(shape)
    clean, start = prepare(images, indices, -7, 2, EPS, noise=noise, backend=backend, block=1024)
    words = philox.random_bits(-7, 2, indices, philox.START, size + size % 2).double()
    if noise == "uniform":
        unit = (words / 256).floor() * 2.0**-23 - 1
    else:
        numbers = (words / 256).floor() * 2.0**-24
        radius = (-2 * (numbers[:, ::2] + 2.0**-24).log()).sqrt()
        angle = 2 * math.pi * numbers[:, 1::2]
        unit = torch.stack((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)
    noise_in_memory_order = (unit[:, :size] * EPS).view(3, *shape).permute(0, 3, 1, 2)
    # Float32 rounds the pixel (below 2: by 2**-24) and eps. Normal numbers: the angle, below 2 pi,
    # is rounded by 2**-22, times the radius, below 6; logarithm, sine and cosine add less.
    tolerance = 2.0**-24 + 6 * EPS * (2.0**-24 if noise == "uniform" else 2.0**-20)
    assert (start - (clean.double() + noise_in_memory_order)).abs().max() <= tolerance


@pytest.mark.interpreter
@pytest.mark.parametrize("noise", ["uniform", "none"])
def test_without_fused_multiplication_both_forms_agree_to_the_bit(noise: Any) -> None:
    images = random_images(9, 32, 32, 3, "cpu")
    indices = torch.tensor([4, 8, 0])
    by_torch = prepare(images, indices, 1, 2, EPS, noise=noise, backend="torch")
    by_kernel = prepare(images, indices, 1, 2, EPS, noise=noise, backend="triton", block=1024)
    assert torch.equal(by_torch[0], by_kernel[0]) and torch.equal(by_torch[1], by_kernel[1])


def test_radius_zero_and_no_noise_start_at_the_clean_image_in_other_memory(place: Place) -> None:
    backend, device = place
    images = random_images(4, 8, 8, 3, device)
    indices = torch.arange(4, device=device)
    for eps, noise in ((0.0, "uniform"), (0.0, "normal"), (EPS, "none")):
        clean, start = prepare(images, indices, 0, 0, eps, noise=noise, backend=backend)  # type: ignore[arg-type]
        assert torch.equal(clean, start)
        start.add_(1)  # an attack works in place
        assert not torch.equal(clean, start)


def test_each_sample_has_its_radius(place: Place) -> None:
    backend, device = place
    images = random_images(3, 32, 32, 3, device)
    indices = torch.arange(3, device=device)
    eps = torch.tensor([0.0, 0.01, 0.1], device=device)
    clean, start = prepare(images, indices, 0, 0, eps, backend=backend, block=1024)
    reach = (start - clean).abs().amax((1, 2, 3))
    # 3072 draws miss the outermost hundredth of the radius with probability e**-30; above it there
    # is only the rounding of a pixel below 2.
    assert (reach >= 0.99 * eps).all() and (reach <= eps + 2.0**-23).all()
    one = prepare(images, indices, 0, 0, eps[1], backend=backend, block=1024)[1]
    assert torch.equal(one[1], start[1])


def test_a_sample_is_the_same_in_every_batch_and_from_every_loader(place: Place) -> None:
    backend, device = place
    images = random_images(20, 32, 32, 3, device)
    indices = torch.tensor([13, 2, 19, 0, 2], device=device)

    def batch(indices: Tensor, source: Tensor, gather: bool) -> Iterator[Tensor]:
        yield from prepare(source, indices, 3, 1, EPS, gather=gather, backend=backend, block=4096)

    together = list(batch(indices, images, True))
    delivered = list(batch(indices, images[indices], False))
    for first, second in zip(together, delivered, strict=True):
        assert torch.equal(first, second)
    for position in range(0, 5, 2):
        alone = batch(indices[position : position + 1], images, True)
        for first, second in zip(together, alone, strict=True):
            assert torch.equal(first[position], second[0])


def test_seed_epoch_and_radius_may_be_tensors(place: Place) -> None:
    backend, device = place
    images = random_images(5, 8, 8, 3, device)
    indices = torch.arange(5, device=device)
    for seed in (3, -3, 2**63 - 1):
        numbers = prepare(images, indices, seed, 6, EPS, backend=backend)
        tensors = prepare(
            images,
            indices,
            torch.tensor(seed, device=device),
            torch.tensor(6, device=device),
            torch.tensor(EPS, device=device),
            backend=backend,
        )
        assert torch.equal(numbers[0], tensors[0]) and torch.equal(numbers[1], tensors[1])
    unsigned = prepare(images, indices, 2**64 - 3, 6, EPS, backend=backend)
    signed = prepare(images, indices, -3, 6, EPS, backend=backend)
    assert torch.equal(unsigned[1], signed[1])


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    channels=st.integers(1, 4),
    padding=st.integers(0, 5),
    flip=st.booleans(),
    batch=st.integers(1, 3),
)
def test_any_shape_agrees_with_the_hand(
    place: Place, height: int, width: int, channels: int, padding: int, flip: bool, batch: int
) -> None:
    backend, device = place
    images = random_images(4, height, width, channels, device)
    indices = torch.tensor([3, 0, 2][:batch], device=device)
    clean, start = prepare(
        images, indices, 8, 0, EPS, padding=padding, flip=flip, backend=backend, block=64
    )
    assert torch.equal(clean.cpu(), by_hand(images.cpu(), indices.cpu(), 8, 0, padding, flip))
    assert ((start - clean).abs() <= EPS + 2.0**-23).all()  # one rounding of a pixel below 2


def test_crops_and_flips_are_drawn_evenly_and_anew_each_epoch() -> None:
    # The one bright pixel of the source shows where it went.
    count = 8100
    images = torch.zeros(1, 9, 11, 1, dtype=torch.uint8)
    images[0, 4, 4, 0] = 255
    images = images.expand(count, -1, -1, -1).contiguous()
    clean, _ = prepare(images, torch.arange(count), 0, 0, 0.0, gather=False, noise="none")
    position = clean.flatten(1).argmax(1)
    assert torch.equal(clean.sum((1, 2, 3)), torch.ones(count))
    rows, columns = position // 11, position % 11
    flipped = columns > 8  # without a flip the pixel stays in columns 0 to 8, with one in 2 to 10
    assert set(rows.tolist()) == set(range(9)) and set(columns.tolist()) == set(range(11))
    assert (rows.bincount() - 900).abs().max() < 5 * math.sqrt(900)  # five standard errors
    # Columns 0, 1 only without flip, 9, 10 only with: each a ninth of a half.
    for edge in (columns < 2, flipped):
        assert abs(int(edge.sum()) - 900) < 5 * math.sqrt(900)
    other, _ = prepare(images, torch.arange(count), 0, 1, 0.0, gather=False, noise="none")
    same = (other.flatten(1).argmax(1) == position).double().mean()
    assert same < 0.05  # 1 / 81 at random, more by flips of the middle


def test_strided_indices_and_radii_are_read_where_they_are(place: Place) -> None:
    backend, device = place
    images = random_images(4, 8, 8, 3, device)
    indices = torch.tensor([3, 0, 2, 1, 0, 3], device=device)[::2]
    eps = torch.linspace(0, 0.1, 6, device=device).view(3, 2)[:, 1]
    strided = prepare(images, indices, 0, 0, eps, backend=backend)
    dense = prepare(images, indices.clone(), 0, 0, eps.clone(), backend=backend)
    assert torch.equal(strided[0], dense[0]) and torch.equal(strided[1], dense[1])
    assert torch.equal(strided[0].cpu(), by_hand(images.cpu(), indices.cpu(), 0, 0, 4, True))


def test_an_empty_batch_is_allowed(place: Place) -> None:
    backend, device = place
    images = random_images(3, 4, 4, 3, device)
    indices = torch.zeros(0, dtype=torch.int64, device=device)
    clean, start = prepare(images, indices, 0, 0, EPS, backend=backend)
    assert clean.shape == start.shape == (0, 3, 4, 4)


def test_nothing_waits_for_the_device(forbid_syncs: None) -> None:
    images = random_images(3, 4, 4, 3, "cpu")
    prepare(images, torch.arange(3), torch.tensor(1), torch.tensor(2), torch.tensor(EPS))


@pytest.mark.parametrize("noise", ["uniform", "normal", "none"])
@pytest.mark.parametrize("gather", [True, False])
def test_the_registered_op_keeps_the_rules_of_torch_library(noise: str, gather: bool) -> None:
    arguments = (
        random_images(3, 6, 6, 3, "cpu"),
        torch.tensor([2, 0, 1]),
        torch.tensor(5),
        torch.tensor(1),
        torch.full((3,), EPS),
        gather,
        4,
        True,
        noise,
        512,
    )
    torch.library.opcheck(_prepare, arguments)
    expected = prepare_torch(*arguments[:-1])
    assert torch.equal(torch.ops.reat_fast.prepare(*arguments)[1], expected[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 4, 4, 3)}, "uint8"),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, "uint8"),
        ({"images": torch.zeros(2, 3, 4, 4, dtype=torch.uint8).mT}, "contiguous"),
        ({"indices": torch.zeros(2)}, "int64"),
        ({"indices": torch.zeros(2, 1, dtype=torch.int64)}, "int64"),
        ({"gather": False}, "gather=True"),
        ({"padding": -1}, "padding=-1"),
        ({"noise": "gaussian"}, "noise='gaussian'"),
        ({"eps": torch.zeros(5)}, "eps has shape"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed has shape"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_a_wrong_argument_is_named(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "images": torch.zeros(4, 4, 4, 3, dtype=torch.uint8),
        "indices": torch.zeros(3, dtype=torch.int64),
        "seed": 0,
        "epoch": 0,
        "eps": EPS,
    }
    with pytest.raises(ValueError, match=message):
        prepare(**(arguments | change))


def test_the_kernel_is_refused_on_the_cpu_outside_the_interpreter() -> None:
    images = random_images(3, 4, 4, 3, "cpu")
    with pytest.raises(ValueError, match="backend='triton'"):
        prepare(images, torch.arange(3), 0, 0, EPS, backend="triton")

"""Batches on their way to the device: the same ones, in order, and never overwritten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reat_fast.loaders import Batch
from reat_fast.loaders.prefetch import to_device


def made_batches(count: int, size: int = 4) -> Iterator[Batch]:
    for number in range(count):
        indices = torch.arange(size) + number * size
        images = (indices % 256).to(torch.uint8).reshape(size, 1, 1, 1).repeat(1, 8, 8, 3)
        yield Batch(images, indices % 7, indices, gather=False)


def test_on_the_cpu_batches_pass_as_they_are() -> None:
    batches = list(made_batches(3))
    assert list(map(id, to_device(iter(batches), torch.device("cpu")))) == list(map(id, batches))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_abandoning_closes_the_source(device: str) -> None:
    source = made_batches(5)
    moved = to_device(source, torch.device(device))
    next(moved)
    assert source.gi_frame is not None  # type: ignore[attr-defined]
    moved.close()  # type: ignore[attr-defined]
    assert source.gi_frame is None  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_copies_on_a_gpu_are_whole_and_stay_so(count: int) -> None:
    device = torch.device("cuda")
    kept = []
    for batch in to_device(made_batches(count, size=4096), device):
        assert batch.images.device.type == batch.labels.device.type == "cuda"
        # Work that is still running when the next batch comes, on memory about to be dropped.
        busy = torch.ones(1024, 1024, device=device)
        for _ in range(5):
            busy = busy @ busy * 1e-3
        kept.append((batch.images.clone(), batch.labels.clone(), batch.indices.clone()))
    assert len(kept) == count
    for (images, labels, indices), expected in zip(kept, made_batches(count, 4096), strict=True):
        assert torch.equal(images.cpu(), expected.images)
        assert torch.equal(labels.cpu(), expected.labels)
        assert torch.equal(indices.cpu(), expected.indices)

"""The resident loader: every image once an epoch, in an order that (seed, epoch) fixes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reat_fast.data import ImageSet
from reat_fast.loaders.resident import ResidentLoader


def make_loader(count: int, batch_size: int, seed: int = 0, **options: bool) -> ResidentLoader:
    images = np.arange(count * 12, dtype=np.uint32).astype(np.uint8).reshape(count, 2, 2, 3)
    labels = np.arange(count, dtype=np.int64) % 3
    image_set = ImageSet(images, labels)
    return ResidentLoader(image_set, batch_size, torch.device("cpu"), seed=seed, **options)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), epoch=st.integers(0, 3))
def test_an_epoch_shows_every_image_once(count: int, batch_size: int, epoch: int) -> None:
    loader = make_loader(count, batch_size)
    batches = list(loader.epoch(epoch))
    assert len(batches) == len(loader) == -(-count // batch_size)
    assert sorted(torch.cat([batch.indices for batch in batches]).tolist()) == list(range(count))
    for batch in batches:
        assert batch.gather and len(batch.images) == count
        assert torch.equal(batch.labels, loader.labels[batch.indices])


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, batch_size: int) -> list[int]:
        loader = make_loader(30, batch_size, seed)
        return torch.cat([batch.indices for batch in loader.epoch(epoch)]).tolist()

    assert order(1, 2, 7) == order(1, 2, 30)
    assert order(1, 2, 7) != order(1, 3, 7)
    assert order(1, 2, 7) != order(2, 2, 7)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_the_short_last_batch_is_kept_unless_dropped(drop_last: bool, sizes: list[int]) -> None:
    loader = make_loader(10, 4, drop_last=drop_last)
    assert [len(batch.labels) for batch in loader.epoch(0)] == sizes
    assert len(loader) == len(sizes)

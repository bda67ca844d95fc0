"""The FFCV loader: the batches of every other loader, and nothing left behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reat_fast.data import ImageSet
from reat_fast.loaders import Batch
from reat_fast.loaders.beton import BetonLoader
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.resident import ResidentLoader
from reat_fast.sources.beton_file import BetonError, read_beton

pytest.importorskip("ffcv", reason="needs FFCV: scripts/ffcv.sh")
from ffcv.fields import IntField, NDArrayField, RGBImageField  # noqa: E402
from ffcv.pipeline.compiler import Compiler  # noqa: E402
from ffcv.writer import DatasetWriter  # noqa: E402

CPU = torch.device("cpu")
COUNT = 1500  # raw images of 32x32 in three of FFCV's smallest pages
PAGE = 1 << 21


@pytest.fixture(autouse=True)
def without_compiling(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let FFCV run as plain Python, which spares each loader seconds of compiling."""
    Compiler.set_enabled(request.node.get_closest_marker("slow") is not None)
    yield
    Compiler.set_enabled(True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, ImageSet]]:
    """Return a function that writes a kind of file, once, and returns it with what it holds."""
    folder = tmp_path_factory.mktemp("beton")
    known: dict[str, tuple[Path, ImageSet]] = {}

    def write(kind: str) -> tuple[Path, ImageSet]:
        if kind not in known:
            path = folder / f"{kind}.beton"
            known[kind] = path, write_beton(path, kind)
        return known[kind]

    return write


def write_beton(path: Path, kind: str) -> ImageSet:
    made = np.random.RandomState(0)
    count, channels = (COUNT, 3) if kind == "raw" else (100, 3 if kind == "jpg" else 1)
    # Steps of 4x4 pixels: noise that JPEG keeps recognisable.
    small = made.randint(0, 256, (count, 8, 8, channels), np.uint8)
    images = small.repeat(4, 1).repeat(4, 2)
    labels = made.randint(0, 5, count)
    field = RGBImageField(kind, jpeg_quality=95)
    shown = images
    if channels == 1:
        shown = images if kind == "grey" else images[..., 0]
        field = NDArrayField(np.dtype(np.uint8), shown.shape[1:])
    fields = {"label": IntField(), "image": field}
    writer = DatasetWriter(str(path), fields, page_size=PAGE, num_workers=1)
    writer.from_indexed_dataset(list(zip(labels.tolist(), shown, strict=True)))
    return ImageSet(images, labels)


@pytest.fixture
def raw(written: Callable[[str], tuple[Path, ImageSet]]) -> tuple[Path, ImageSet]:
    return written("raw")


def batches_of(loader: Any, epoch: int = 0, first: int = 0) -> list[Batch]:
    return list(loader.epoch(epoch, first))


def images_of(batch: Batch) -> torch.Tensor:
    return batch.images[batch.indices] if batch.gather else batch.images


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.indices, other.indices)
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(images_of(batch), images_of(other))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("sampler", ["instance", "class-balanced"])
def test_batches_are_those_of_the_resident_loader(
    raw: tuple[Path, ImageSet], drop_last: bool, sampler: str
) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 128, sampler=sampler, seed=5, drop_last=drop_last)
    loader = BetonLoader(image_set, order, CPU, path=path)
    assert len(order) == (11 if drop_last else 12)
    for epoch in range(2):
        batches = batches_of(loader, epoch)
        assert_same(batches, batches_of(ResidentLoader(image_set, order, CPU), epoch))
        assert not batches[0].gather and batches[0].images.dtype == torch.uint8
    loader.close()


def test_a_subset_takes_its_rows_of_the_file(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    rows = np.random.RandomState(1).permutation(COUNT)[:700]
    subset = image_set.take(rows)
    order = EpochOrder(subset.labels, 128)
    expected = batches_of(ResidentLoader(subset, order, CPU))
    assert_same(batches_of(BetonLoader(subset, order, CPU, path=path, rows=rows)), expected)
    lazy = ImageSet(read_beton(path).images.take(rows), subset.labels)
    assert_same(batches_of(BetonLoader(lazy, order, CPU, path=path)), expected)


def test_an_epoch_goes_on_from_any_batch(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 128, seed=2)
    loader = BetonLoader(image_set, order, CPU, path=path)
    whole = batches_of(loader, 3)
    assert_same(batches_of(loader, 3, first=5), whole[5:])
    assert batches_of(loader, 3, first=len(order)) == []


def test_ranks_share_each_batch_even_where_it_is_too_small(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    rows = np.arange(301)
    subset = image_set.take(rows)  # batches of 75 and a last one of 1, which leaves rank 1 none

    def batches(rank: int, world: int) -> list[Batch]:
        order = EpochOrder(subset.labels, 75, rank=rank, world=world)
        return batches_of(BetonLoader(subset, order, CPU, path=path, rows=rows))

    first, second, alone = batches(0, 2), batches(1, 2), batches(0, 1)
    assert [len(batch.indices) for batch in first] == [38, 38, 38, 38, 1]
    assert [len(batch.indices) for batch in second] == [37, 37, 37, 37, 0]
    assert second[-1].images.shape == (0, 32, 32, 3)
    joined = [
        Batch(
            *(torch.cat(pair) for pair in zip(images_of_all(a), images_of_all(b), strict=True)),
            False,
        )  # type: ignore[misc]
        for a, b in zip(first, second, strict=True)
    ]
    assert_same(joined, alone)


def images_of_all(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return batch.images, batch.labels, batch.indices


def test_kept_batches_stay_as_they_were(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 50)
    kept = batches_of(BetonLoader(image_set, order, CPU, path=path))
    assert len(kept) > 12  # FFCV's ring has 5 buffers
    for batch in kept:
        assert torch.equal(batch.images, torch.from_numpy(image_set.images)[batch.indices])


def test_two_loaders_may_be_read_in_turn(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 128)
    one, other = (BetonLoader(image_set, order, CPU, path=path) for _ in range(2))
    pairs = list(zip(one.epoch(0), other.epoch(0), strict=True))
    assert_same([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def test_an_abandoned_epoch_leaves_nothing_behind(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 50)
    loader = BetonLoader(image_set, order, CPU, path=path)

    def abandon(epoch: int) -> tuple[int, int]:
        for _ in loader.epoch(epoch):
            break
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = abandon(0)
    assert [abandon(epoch) for epoch in range(10)] == [before] * 10
    assert before[0] == threading.active_count()
    assert len(batches_of(loader, 0)) == len(loader.order)


def test_the_number_of_threads_of_torch_stays(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        order = EpochOrder(image_set.labels, 500)
        batches_of(BetonLoader(image_set, order, CPU, path=path, workers=1))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_jpeg_differs_from_pillow_by_the_decoder_only(
    written: Callable[[str], tuple[Path, ImageSet]],
) -> None:
    path, image_set = written("jpg")
    images = read_beton(path).images
    order = EpochOrder(image_set.labels, 32)
    for batch in BetonLoader(image_set, order, CPU, path=path).epoch(0):
        other = images[batch.indices.numpy()].astype(int)
        off = np.abs(batch.images.numpy() - other)
        # FFCV asks libjpeg for the fast cosine transform, which is coarse at high quality: on
        # CIFAR-10 (quality 95) off by 1.7 on average and 22 at most. Another image is off by 85.
        assert off.mean() < 4 and off.max() <= 40


@pytest.mark.parametrize("kind", ["grey", "plane"])
def test_grey_images_have_one_channel(
    written: Callable[[str], tuple[Path, ImageSet]], kind: str
) -> None:
    path, image_set = written(kind)
    order = EpochOrder(image_set.labels, 32)
    expected = batches_of(ResidentLoader(image_set, order, CPU))
    assert_same(batches_of(BetonLoader(image_set, order, CPU, path=path)), expected)
    assert expected[0].images.shape[1:] == (32, 32, 1)


def test_file_and_training_set_have_to_agree(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 128)

    def refused(images: ImageSet, rows: np.ndarray[Any, Any] | None, message: str) -> None:
        with pytest.raises(BetonError, match=message) as raised:
            BetonLoader(images, order, CPU, path=path, rows=rows)
        assert "\n" not in str(raised.value)

    labels = image_set.labels.copy()
    labels[7] = 4 if labels[7] != 4 else 3
    refused(ImageSet(image_set.images, labels), None, f"image 7 has label .* has {labels[7]};")
    rows = np.arange(COUNT)
    for at in (COUNT, -1):
        rows[3] = at
        refused(image_set, rows, f"rows must be in 0..{COUNT - 1}, got")
    refused(image_set.take(np.arange(5)), None, f"{COUNT} images for a training set of 5")
    refused(ImageSet(image_set.images[:, :16], image_set.labels), None, r"\[32, 32, 3\], those")


def test_a_negative_number_of_workers_is_refused(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 128)
    with pytest.raises(ValueError, match="--workers -1: must be 0 or more"):
        BetonLoader(image_set, order, CPU, path=path, workers=-1)


def test_without_ffcv_the_cure_is_named(
    raw: tuple[Path, ImageSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, image_set = raw
    monkeypatch.setitem(sys.modules, "ffcv.loader", None)
    with pytest.raises(ValueError, match=r'scripts/ffcv.sh .* pip install "reat-fast\[ffcv\]"'):
        BetonLoader(image_set, EpochOrder(image_set.labels, 128), CPU, path=path)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_in_ffcvs_thread_is_raised(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    loader = BetonLoader(image_set, EpochOrder(image_set.labels, 128), CPU, path=path)

    def fail(**arguments: Any) -> None:
        raise OSError("the disk is gone")

    loader._ffcv.code = ([(fail, [])], [])
    with pytest.raises(BetonError, match="FFCV stopped reading"):
        batches_of(loader)


def test_a_closed_loader_says_so(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    loader = BetonLoader(image_set, EpochOrder(image_set.labels, 128), CPU, path=path)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="closed"):
        batches_of(loader)


@pytest.mark.slow
def test_the_compiled_decoder_gives_the_same(raw: tuple[Path, ImageSet]) -> None:
    path, image_set = raw
    order = EpochOrder(image_set.labels, 128)
    batches = batches_of(BetonLoader(image_set, order, CPU, path=path, workers=2))
    assert_same(batches, batches_of(ResidentLoader(image_set, order, CPU)))

"""The DALI loader: files decoded and cut as pillow does, and clear lines for what cannot be."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from reat_fast.data import ImageSet
from reat_fast.loaders import Batch
from reat_fast.loaders.dali import DaliLoader
from reat_fast.loaders.order import EpochOrder
from reat_fast.sources.lazy import FileImages, LazyImages

CPU = torch.device("cpu")
SIZE = 24
# Width and height: as wanted, then with 1, 2, 3 and 5 pixels beyond the square, then others.
SIDES = [(24, 24), (24, 25), (26, 24), (27, 24), (24, 29), (96, 48), (47, 33), (50, 71), (12, 20)]
Bytes = npt.NDArray[np.uint8]


def write(folder: Path, suffix: str) -> list[Path]:
    """Write an image of noise for each of SIDES: a shift by one pixel changes nearly all of it."""
    image = pytest.importorskip("PIL.Image", reason="needs pillow")
    made, paths = np.random.RandomState(0), []
    for number, (width, height) in enumerate(SIDES):
        paths.append(folder / f"{number}{suffix}")
        pixels = made.randint(0, 256, (height, width, 3)).astype(np.uint8)
        image.fromarray(pixels).save(paths[-1])
    return paths


def load(images: Bytes | LazyImages, batch_size: int = 4) -> DaliLoader:
    pytest.importorskip("nvidia.dali", reason="needs DALI")
    labels = np.arange(len(images)) % 3
    return DaliLoader(ImageSet(images, labels), EpochOrder(labels, batch_size), CPU)


def decoded(batches: Iterable[Batch]) -> npt.NDArray[np.int64]:
    """Return the images of an epoch as they lie in the set."""
    parts = [(batch.images, batch.indices) for batch in batches]
    images, places = (torch.cat(part) for part in zip(*parts, strict=True))
    return images[places.argsort()].long().numpy()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_files_are_decoded_and_cut_as_pillow_does(tmp_path: Path, suffix: str) -> None:
    images = FileImages(write(tmp_path, suffix), SIZE)
    difference = np.abs(decoded(load(images).epoch(0)) - images[:])
    for (width, height), found in zip(SIDES, difference, strict=True):
        if min(width, height) == SIZE:
            assert not found.any()  # the same decoder, and the same square of what it gives
        # Pillow rounds after each of its two passes and DALI once: 3 halves, which is 1 of whole
        # levels. The outermost pixels differ by more, for DALI repeats them where pillow stops.
        assert found[1:-1, 1:-1].max() <= 1, (width, height)


def test_an_abandoned_epoch_leaves_nothing_for_the_next(tmp_path: Path) -> None:
    images = FileImages(write(tmp_path, ".png"), SIZE)
    loader = load(images, batch_size=2)
    whole = decoded(loader.epoch(0))
    for taken in range(len(loader.order)):
        iterator = loader.epoch(0)
        for _ in range(taken):
            next(iterator)
        iterator.close()  # type: ignore[attr-defined]
        np.testing.assert_array_equal(decoded(loader.epoch(0)), whole)


def test_two_epochs_at_once_are_refused_and_the_later_one_is_whole(tmp_path: Path) -> None:
    images = FileImages(write(tmp_path, ".png"), SIZE)
    loader = load(images, batch_size=2)
    whole = decoded(loader.epoch(0))
    earlier, later = loader.epoch(0), loader.epoch(0)
    next(earlier)
    first = next(later)
    with pytest.raises(ValueError, match="^DALI loader: a later epoch was begun; read one at"):
        next(earlier)
    np.testing.assert_array_equal(decoded([first, *later]), whole)


@pytest.mark.parametrize("closed", [True, False])
def test_the_threads_end_with_the_loader_at_once(closed: bool) -> None:
    def threads() -> int:
        return len(list(Path("/proc/self/task").iterdir()))

    load(np.zeros((9, 2, 2, 3), np.uint8)).close()  # DALI keeps some threads for later pipelines
    gc.collect()
    before = threads()
    gc.disable()  # a pipeline left to the collector might be freed in a process forked later
    try:
        loader = load(np.zeros((9, 2, 2, 3), np.uint8))
        list(loader.epoch(0))
        assert threads() > before
        if closed:
            loader.close()
        else:
            del loader
        assert threads() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("content", [None, b"", b"not an image"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes | None) -> None:
    paths = write(tmp_path, ".jpg")
    paths[5].unlink()
    if content is not None:
        paths[5].write_bytes(content)
    loader = load(FileImages(paths, SIZE))
    with pytest.raises(ValueError, match=r"^[^\n]*5.jpg: [^\n]*$"):
        list(loader.epoch(0))
    with pytest.raises(ValueError, match="the DALI loader is closed: make another"):
        next(loader.epoch(0))


def test_a_file_that_only_dali_cannot_read_sends_to_another_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = write(tmp_path, ".jpg")
    paths[5].write_bytes(b"not an image")
    monkeypatch.setattr(FileImages, "read", lambda self, rows: None)
    with pytest.raises(ValueError, match=r"^--loader dali: DALI .* \(.+\); use --loader workers$"):
        list(load(FileImages(paths, SIZE)).epoch(0))


def test_a_fault_of_lazy_images_is_passed_on() -> None:
    class Broken(LazyImages):
        def read(self, indices: npt.NDArray[np.int64]) -> Bytes:
            raise ValueError("a.png: broken; replace it")

    with pytest.raises(ValueError, match="^a.png: broken; replace it$"):
        list(load(Broken((9, 2, 2, 3))).epoch(0))


def test_threads_are_at_least_one() -> None:
    labels = np.zeros(4, np.int64)
    images = ImageSet(np.zeros((4, 2, 2, 3), np.uint8), labels)
    with pytest.raises(ValueError, match="^--workers 0: DALI needs at least 1 thread$"):
        DaliLoader(images, EpochOrder(labels, 2), CPU, threads=0)


def test_without_dali_the_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    labels = np.zeros(4, np.int64)
    images = ImageSet(np.zeros((4, 2, 2, 3), np.uint8), labels)
    with pytest.raises(ValueError, match=r'^--loader dali .*: pip install "reat-fast\[dali\]"$'):
        DaliLoader(images, EpochOrder(labels, 2), CPU)

"""Lazy images: indexed like the array they stand for, decoded as the evaluation transform says."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from reat_fast.sources.formats import DataError
from reat_fast.sources.lazy import FileImages, LazyImages, LazyView, find_damaged

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 4, 5, 3), np.uint8)


class Counted(LazyImages):
    """Give made pixels and count the images that were asked for."""

    def __init__(self) -> None:
        super().__init__((9, 4, 5, 3))
        self.decoded = 0

    def read(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        self.decoded += len(indices)
        return PIXELS[indices]


@pytest.mark.parametrize(
    "index",
    [
        0,
        -1,
        np.int64(3),
        slice(2, 7),
        slice(None, None, -2),
        slice(8, 20),
        [1, 1, -2],
        [],
        np.array([], np.int64),
        np.array([8, 0, 8]),
        np.arange(9) % 2 == 0,
    ],
    ids=str,
)
def test_indexing_is_that_of_an_array(index: object) -> None:
    expected = PIXELS[index]  # type: ignore[index]
    found = Counted()[index]  # type: ignore[index]
    assert np.array_equal(found, expected) and found.dtype == np.uint8


def test_shape_size_and_conversion_are_those_of_an_array() -> None:
    images = Counted()
    assert (images.shape, images.dtype, images.ndim) == (PIXELS.shape, PIXELS.dtype, PIXELS.ndim)
    assert len(images) == 9 and images.nbytes == PIXELS.nbytes
    assert images.decoded == 0
    assert np.array_equal(np.asarray(images), PIXELS)
    assert np.asarray(images, np.float32).dtype == np.float32
    assert len(list(images)) == 9  # type: ignore[call-overload]


@pytest.mark.parametrize("index", [9, -10, [0, 9], np.zeros(3, bool)])
def test_positions_outside_the_set_are_refused(index: object) -> None:
    with pytest.raises(IndexError):
        Counted()[index]  # type: ignore[index]
    with pytest.raises(TypeError, match="first axis only"):
        Counted()[0, 0]


def test_a_view_of_a_view_decodes_only_what_is_read_from_the_source() -> None:
    images = Counted()
    view = images.take(np.array([7, 3, 3, 0])).take([-1, 0])
    assert isinstance(view, LazyView) and view.source is images
    assert view.rows.tolist() == [0, 7] and view.shape == (2, 4, 5, 3)
    assert images.decoded == 0
    assert np.array_equal(view[:], PIXELS[[0, 7]])
    assert images.decoded == 2


def save(path: Path, height: int, width: int, mode: str = "RGB") -> Path:
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def test_files_of_the_right_size_keep_their_pixels(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{number}.png", 6, 6) for number in range(3)]
    images = FileImages(paths, 6)
    assert images.shape == (3, 6, 6, 3)
    for number, path in enumerate(paths):
        assert np.array_equal(images[number], np.asarray(Image.open(path)))
    chosen = images.take([2, 0])
    assert isinstance(chosen, FileImages) and chosen.paths == [paths[2], paths[0]]
    assert np.array_equal(chosen[:], images[[2, 0]])
    assert np.array_equal(pickle.loads(pickle.dumps(images))[:], images[:])


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    [
        (20, 30, (6, 9), (0, 2)),  # 1.5 rounds to even, as torchvision's centre crop does
        (30, 20, (9, 6), (2, 0)),
        (12, 31, (6, 15), (0, 4)),
        (3, 4, (6, 8), (0, 1)),  # smaller than asked: enlarged
        (6, 11, (6, 11), (0, 2)),
    ],
)
def test_other_sizes_are_resized_on_the_short_side_and_cut_at_the_centre(
    tmp_path: Path, height: int, width: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    path = save(tmp_path / "image.png", height, width)
    whole = Image.open(path).resize(resized[::-1], Image.Resampling.BILINEAR)
    expected = np.asarray(whole)[corner[0] : corner[0] + 6, corner[1] : corner[1] + 6]
    assert np.array_equal(FileImages([path], 6)[0], expected)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "LA"])
def test_8_bit_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "image.png", 6, 6, mode)
    assert np.array_equal(FileImages([path], 6)[0], np.asarray(Image.open(path).convert("RGB")))


def test_no_files_give_no_images() -> None:
    assert FileImages([], 4)[:].shape == (0, 4, 4, 3)
    assert find_damaged(FileImages([], 4)) == {}


def test_damaged_files_are_found_and_named(tmp_path: Path) -> None:
    paths = [save(tmp_path / f"{number}.jpg", 40, 40) for number in range(5)]
    paths[1].write_bytes(paths[1].read_bytes()[:-300])
    paths[2].write_bytes(b"<html>not here</html>")
    Image.fromarray(np.full((40, 40), 60_000, np.uint16)).save(tmp_path / "deep.png")
    images = FileImages([*paths, tmp_path / "deep.png", tmp_path / "gone.png"], 8)
    damaged = find_damaged(images)
    assert list(damaged) == [1, 2, 5, 6]
    for index, reason in damaged.items():
        assert reason.startswith(f"{images.paths[index]}: ") and "\n" not in reason
        with pytest.raises(DataError) as caught:
            images[index]
        assert str(caught.value) == reason
    assert "truncated" in damaged[1] and "not 8-bit" in damaged[5] and "not found" in damaged[6]


def test_a_size_that_cannot_be_is_refused() -> None:
    with pytest.raises(DataError, match="image size must be at least 1 pixel, got 0"):
        FileImages([], 0)


def test_without_pillow_the_pip_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'pip install "reat-fast\[images\]"'):
        FileImages([Path("image.png")], 4)[0]

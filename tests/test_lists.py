"""Image files: class folders, lists and Tiny-ImageNet; every fault is one line with its files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
from damage import MUTATIONS, mutated, refused_or_valid
from PIL import Image

from reat_fast.data import load_dataset
from reat_fast.sources import lists
from reat_fast.sources.formats import DataError
from reat_fast.sources.lazy import FileImages

RANDOM = np.random.default_rng(0)


def write_images(folder: Path, mode: str = "RGB", suffix: str = ".png") -> Path:
    for part, classes in (("train", "ba"), ("test", "a")):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(2):
                pixels = RANDOM.integers(0, 256, (4, 6, 3), np.uint8)
                image = Image.fromarray(pixels).convert(mode)
                image.save(folder / part / name / f"{number}{suffix}")
    return folder


@pytest.mark.parametrize(
    "suffix", [".png", ".PNG", ".jpg", ".jpeg", ".webp", ".BMP", ".tif", ".tiff", ".ppm", ".pgm"]
)
def test_image_folder_is_read_in_sorted_order(tmp_path: Path, suffix: str) -> None:
    write_images(tmp_path, suffix=suffix)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "._0.png").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    source = lists.read_image_folder(tmp_path)
    x_train, y_train, x_test, y_test = source.arrays
    assert source.class_names == ("a", "b")
    assert x_train.shape == (4, 4, 6, 3) and x_train.dtype == np.uint8
    assert y_train.tolist() == [0, 0, 1, 1] and y_test.tolist() == [0, 0]
    expected = np.asarray(Image.open(tmp_path / "train" / "b" / f"1{suffix}"))
    assert np.array_equal(x_train[3], expected)
    assert np.array_equal(x_test[0], np.asarray(Image.open(tmp_path / "test" / "a" / f"0{suffix}")))


def test_image_folder_is_grey_only_if_every_image_is(tmp_path: Path) -> None:
    write_images(tmp_path, "L")
    grey = lists.read_image_folder(tmp_path).arrays[0]
    assert grey.shape == (4, 4, 6)
    Image.new("RGB", (6, 4), (1, 2, 3)).save(tmp_path / "test" / "a" / "0.png")
    x_train, _, x_test, _ = lists.read_image_folder(tmp_path).arrays
    assert np.array_equal(x_train, np.repeat(grey[..., None], 3, 3))
    assert x_test[0, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "1"])
def test_other_8_bit_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    arrays = lists.read_image_folder(write_images(tmp_path, mode)).arrays
    assert arrays[0].shape == (4, 4, 6, 3)
    expected = np.asarray(Image.open(tmp_path / "train" / "a" / "0.png").convert("RGB"))
    assert np.array_equal(arrays[0][0], expected)


def test_image_folder_faults_name_the_file(tmp_path: Path) -> None:
    def read_after(change: Callable[[Path], object]) -> str:
        folder = write_images(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(folder)
        with pytest.raises(DataError) as caught:
            lists.read_image_folder(folder)
        message = str(caught.value)
        assert message.startswith(str(folder)) and "\n" not in message
        return message.removeprefix(f"{folder}/")

    large = Image.new("RGB", (8, 8))
    deep = Image.fromarray(np.full((4, 6), 60_000, np.uint16))
    message = read_after(lambda folder: large.save(folder / "train/b/0.png"))
    assert message.startswith("train/b/0.png: 8x8 pixels, but 6x4 in ")
    message = read_after(lambda folder: (folder / "test/a/1.png").write_bytes(b"\x89PNG\r\n"))
    assert message.startswith("test/a/1.png: cannot be read")
    message = read_after(lambda folder: deep.save(folder / "train/a/0.png"))
    assert message.startswith("train/a/0.png: mode I;16 is not 8-bit")
    message = read_after(lambda folder: (folder / "train/empty").mkdir())
    assert message.startswith("train/empty: no .png")
    message = read_after(lambda folder: (folder / "train/b").rename(folder / "train/a/b"))
    assert message.startswith("train/a/b: holds images, deeper than train/CLASS/*.png; move them")
    message = read_after(lambda folder: (folder / "test/a").rename(folder / "test/z"))
    assert message.startswith("test/z: there is no such class in ")
    message = read_after(lambda folder: (folder / "test").rename(folder / "val"))
    assert message.startswith("test: not found; rename val to test, if that is what")
    message = read_after(lambda folder: (folder / "test").rename(folder / "other"))
    assert message.startswith("test: not found; make it train/CLASS/*.png")
    message = read_after(lambda folder: (folder / "test/a").rename(folder / "a"))
    assert message.startswith("test: no class folders inside")
    message = read_after(
        lambda folder: [(folder / "val").mkdir(), (folder / "train").rename(folder / "x")]
    )
    assert message.startswith("train: not found; make it train/CLASS/*.png")


@pytest.mark.parametrize(("name", "counts"), [("1.PNG", True), ("._1.png", False), ("1", False)])
def test_names_that_are_shown_and_end_like_images_are_images_deeper_too(
    name: str, counts: bool, tmp_path: Path
) -> None:
    folder = write_images(tmp_path)
    (folder / "train/a/more").mkdir()
    (folder / "train/a/more" / name).touch()
    with pytest.raises(DataError, match="holds images, deeper") if counts else nullcontext():
        lists.read_image_folder(folder)


def test_without_pillow_the_pip_line_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_images(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r'pip install "reat-fast\[images\]"'):
        lists.read_image_folder(tmp_path)


def test_no_damage_to_an_image_gives_anything_but_an_error(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "train" / "a" / "0.png"
    refused = 0
    for damaged in mutated(path.read_bytes()):
        path.write_bytes(damaged)
        refused += refused_or_valid(lambda: lists.read_image_folder(tmp_path))
    assert refused > MUTATIONS // 2


def test_two_damaged_files_are_counted_and_named_and_can_be_left_out(tmp_path: Path) -> None:
    write_images(tmp_path)
    whole = load_dataset("folder", tmp_path)
    damage(tmp_path / "train/a/1.png")
    deep = np.full((4, 6), 60_000, np.uint16)
    Image.fromarray(deep).save(tmp_path / "test/a/0.png")
    with pytest.raises(
        DataError, match=r"^2 of 6 images cannot be decoded: .*/train/a/1.png: "
    ) as e:
        load_dataset("folder", tmp_path)
    assert "/test/a/0.png: mode I;16 is not 8-bit; replace them, or " in str(e.value)
    rest = load_dataset("folder", tmp_path, skip_bad=True)
    assert rest.train.labels.tolist() == [0, 1, 1] and rest.test.labels.tolist() == [0]
    assert np.array_equal(rest.train.images, whole.train.images[[0, 2, 3]])  # type: ignore[arg-type]
    (note,) = rest.notes
    assert note.startswith("left out 2 of 6 images that cannot be decoded: ")
    damage(tmp_path / "train/a/0.png")
    with pytest.raises(DataError, match=r"class 0 \(a\) has no image"):
        load_dataset("folder", tmp_path, skip_bad=True)


def test_an_image_folder_with_a_size_is_lazy_and_may_hold_any_sizes(tmp_path: Path) -> None:
    write_images(tmp_path)
    Image.new("RGB", (50, 60), (1, 2, 3)).save(tmp_path / "train" / "b" / "0.png")
    dataset = load_dataset("folder", tmp_path, image_size=4)
    assert isinstance(dataset.train.images, FileImages)
    assert dataset.train.images.shape == (4, 4, 4, 3) and dataset.train.labels.tolist() == [
        0,
        0,
        1,
        1,
    ]
    assert (dataset.train.images[2] == (1, 2, 3)).all()


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:60])


# lists


def write_lists(folder: Path, train: str = "train.txt", test: str = "test.txt") -> Path:
    """Write five images and lists that name them: three of two classes to train on, two to test."""
    folder.mkdir(exist_ok=True)
    for number in range(5):
        pixels = RANDOM.integers(0, 256, (6, 8, 3), np.uint8)
        (folder / f"class {number % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"class {number % 2}" / f"{number}.png")
    (folder / train).write_text("class 0/0.png 0\nclass 0/2.png 0\nclass 1/1.png 1\n")
    (folder / test).write_text("class 0/4.png 0\r\nclass 1/3.png\t1\r\n\n")
    return folder


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train.txt", "test.txt"),
        ("ImageNet_LT_train.txt", "ImageNet_LT_test.txt"),
        ("Places_LT_train.txt", "Places_LT_val.txt"),
    ],
)
def test_lists_are_read_lazily_with_paths_that_hold_spaces(
    tmp_path: Path, train: str, test: str
) -> None:
    dataset = load_dataset("list", write_lists(tmp_path, train, test), image_size=6)
    images = dataset.train.images
    assert isinstance(images, FileImages) and images.shape == (3, 6, 6, 3)
    assert [path.name for path in images.paths] == ["0.png", "2.png", "1.png"]
    assert dataset.train.labels.tolist() == [0, 0, 1] and dataset.test.labels.tolist() == [0, 1]
    assert dataset.class_names == ("0", "1")
    expected = np.asarray(Image.open(tmp_path / "class 1" / "1.png"))[:, 1:7]
    assert np.array_equal(images[2], expected)


def test_a_test_list_is_preferred_to_a_validation_list(tmp_path: Path) -> None:
    write_lists(tmp_path, test="Places_LT_test.txt")
    (tmp_path / "Places_LT_val.txt").write_text("class 0/0.png 0\n")
    assert len(load_dataset("list", tmp_path, image_size=6).test) == 2


def test_lists_may_say_where_their_images_are(tmp_path: Path) -> None:
    folder = write_lists(tmp_path / "images")
    apart = tmp_path / "lists"
    apart.mkdir()
    for name, root in (("train.txt", str(folder)), ("test.txt", "../images")):
        (apart / name).write_text(f"# root: {root}\n" + (folder / name).read_text())
    found = load_dataset("list", apart, image_size=6)
    expected = load_dataset("list", folder, image_size=6)
    assert np.array_equal(found.train.images[:], expected.train.images[:])
    assert np.array_equal(found.test.images[:], expected.test.images[:])


LISTS = {
    "no list": (None, r"no train.txt or \*_train.txt inside; add it"),
    "empty": ("", r"train.txt: lists no image; write lines `path label` into it"),
    "root alone": ("# root: here\n", r"train.txt: lists no image"),
    "no label": (
        "class 0/0.png\na 1\nclass 0/2.png x",
        r"2 lines not of the form .* \(line 1, 3\)",
    ),
    "negative": ("class 0/0.png -1", r"1 line not of the form `path label`.* \(line 1\)"),
    "huge": (f"class 0/0.png {10**30}", r"1 line not of the form"),
    "blank inside": ("class 0/0.png 0\n\nclass 1/1.png 1", r"1 line not of the form .* \(line 2\)"),
    "gap": ("class 0/0.png 0\nclass 1/1.png 2", "class 1 has no image; add some, or number the"),
    "class only tested": ("class 0/0.png 0", r"test.txt: labels must be in 0\.\.0, got 0\.\.1"),
    "missing": (
        "class 0/0.png 0\n" + "".join(f"gone/{number}.png 0\n" for number in range(12)),
        r"12 of 13 images are not there \(under .*: gone/0.png, .*, gone/9.png and 2 more\)",
    ),
    "null": ("class 0/\0.png 0", r"1 of 1 images are not there"),
}


@pytest.mark.parametrize(("content", "message"), LISTS.values(), ids=LISTS)
def test_a_bad_list_is_refused_in_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    write_lists(tmp_path)
    (tmp_path / "train.txt").unlink()
    if content is not None:
        (tmp_path / "train.txt").write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("list", tmp_path, image_size=6)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_other_list_faults_are_named(tmp_path: Path) -> None:
    write_lists(tmp_path)
    with pytest.raises(DataError, match="dataset list needs --image-size N"):
        load_dataset("list", tmp_path)
    with pytest.raises(DataError, match="dataset list needs --data FOLDER of train.txt"):
        load_dataset("list")
    (tmp_path / "test.txt").write_bytes(b"\xff\xfe 0\n")
    with pytest.raises(DataError, match=r"test.txt: cannot be read .* UTF-8"):
        load_dataset("list", tmp_path, image_size=6)
    (tmp_path / "train.txt").rename(tmp_path / "a_train.txt")
    (tmp_path / "b_train.txt").touch()
    with pytest.raises(DataError, match=r"a_train.txt, .*b_train.txt are all lists; leave one"):
        load_dataset("list", tmp_path, image_size=6)


def test_a_name_that_leads_to_no_file_is_refused_at_once(tmp_path: Path) -> None:
    write_images(tmp_path)
    folder = next((tmp_path / "test").iterdir())
    (folder / "lost.PNG").symlink_to(tmp_path / "gone.png")
    with pytest.raises(DataError, match=rf"{folder}: lost.PNG leads to no file; put it there or"):
        load_dataset("folder", tmp_path, image_size=6)


def test_an_image_too_thin_to_be_resized_is_named(tmp_path: Path) -> None:
    Image.new("L", (1, 60_000)).save(tmp_path / "thin.png")
    images = FileImages([tmp_path / "thin.png"], 224)
    with pytest.raises(DataError, match=r"thin.png: cannot be read \(1x60000 pixels are too thin"):
        images.read(np.array([0]))


def test_a_list_may_begin_with_the_mark_of_windows_editors(tmp_path: Path) -> None:
    write_lists(tmp_path)
    plain = load_dataset("list", str(tmp_path), image_size=6)
    file = tmp_path / "train.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    marked = load_dataset("list", str(tmp_path), image_size=6)
    assert np.array_equal(marked.train.images[:], plain.train.images[:])


def test_damaged_files_of_a_list_are_left_out_or_named_when_read(tmp_path: Path) -> None:
    write_lists(tmp_path)
    damage(tmp_path / "class 0" / "2.png")
    dataset = load_dataset("list", tmp_path, image_size=6)
    with pytest.raises(DataError, match=r"class 0/2.png: cannot be read .* with --skip-bad$"):
        dataset.train.images[:]
    rest = load_dataset("list", tmp_path, image_size=6, skip_bad=True)
    assert rest.train.labels.tolist() == [0, 1] and len(rest.test) == 2
    assert np.array_equal(rest.train.images[:], dataset.train.images[[0, 2]])
    assert rest.notes[0].startswith("left out 1 of 3 images that cannot be decoded: ")


# Tiny-ImageNet


def write_tiny_imagenet(folder: Path) -> Path:
    for wnid in ("n02", "n01"):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for number in range(2):
            made_jpeg(folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
    (folder / "val" / "images").mkdir(parents=True)
    for number in range(3):
        made_jpeg(folder / "val" / "images" / f"val_{number}.JPEG")
    rows = [f"val_{number}.JPEG\tn0{2 - number % 2}\t0\t1\t2\t3\n" for number in range(3)]
    (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    (folder / "wnids.txt").write_text("n02\nn01\n")
    (folder / "words.txt").write_text("n00\tentity\nn01\tgoldfish, Carassius auratus\n")
    return folder


def made_jpeg(path: Path) -> None:
    Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), np.uint8)).save(path, "JPEG")


def test_tiny_imagenet_is_read_with_its_validation_part_as_test_set(tmp_path: Path) -> None:
    dataset = load_dataset("tiny-imagenet", write_tiny_imagenet(tmp_path), image_size=8)
    images = dataset.train.images
    assert isinstance(images, FileImages)
    names = ["n01_0.JPEG", "n01_1.JPEG", "n02_0.JPEG", "n02_1.JPEG"]
    assert [path.name for path in images.paths] == names
    assert dataset.train.labels.tolist() == [0, 0, 1, 1]
    assert dataset.test.labels.tolist() == [1, 0, 1]
    assert dataset.class_names == ("goldfish", "n02")
    expected = np.asarray(Image.open(tmp_path / "val" / "images" / "val_1.JPEG"))
    assert np.array_equal(dataset.test.images[1], expected)
    assert load_dataset("tiny-imagenet", tmp_path).train.images.shape == (4, 64, 64, 3)


def test_tiny_imagenet_faults_name_the_file(tmp_path: Path) -> None:
    def refusal() -> str:
        with pytest.raises(DataError) as caught:
            load_dataset("tiny-imagenet", tmp_path)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path}/") and "\n" not in message
        return message.removeprefix(f"{tmp_path}/")

    write_tiny_imagenet(tmp_path)
    annotations = tmp_path / "val" / "val_annotations.txt"
    good = annotations.read_text()
    annotations.write_text(good + "val_0.JPEG n01\nval_1.JPEG\tn07\n")
    assert refusal().startswith("val/val_annotations.txt: 2 lines not of the form `file<TAB>wnid`")
    annotations.write_text(good)
    (tmp_path / "val" / "images" / "val_2.JPEG").unlink()
    assert refusal().startswith("val/val_annotations.txt: 1 of 3 images are not there")
    (tmp_path / "train" / "n01").rename(tmp_path / "train" / "n03")
    assert refusal().startswith("train/n01/images: not found; add it")
    (tmp_path / "wnids.txt").unlink()
    assert refusal().startswith("wnids.txt: not found; add it")

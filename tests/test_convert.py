"""The converter: what comes out is what went in, and a failure leaves what was there before."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from damage import let_the_second_rename_fail, mutated, refused_or_valid
from made_data import made_npz
from PIL import Image

from reat_fast import convert
from reat_fast.cli.command import run_command
from reat_fast.data import (
    DataError,
    Dataset,
    ImageSet,
    load_dataset,
    longtail_counts,
    longtail_indices,
)
from reat_fast.sources import beton_folder
from reat_fast.sources.beton_file import BetonImages


@pytest.fixture
def ffcv() -> None:
    pytest.importorskip("ffcv", reason="needs FFCV: scripts/ffcv.sh installs it")


@pytest.fixture
def source(tmp_path: Path) -> list[str]:
    """Return the arguments that name a made set of 4 classes with 40 and 6 images each."""
    return ["npz", "--data", str(made_npz(tmp_path / "source.npz"))]


def run(*arguments: object) -> int:
    return run_command(convert.main, [str(argument) for argument in arguments])


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the one line that a failing command prints."""
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
    assert not captured.out
    return captured.err.removeprefix("error: ").rstrip()


def pixels(image_set: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(image_set.images)


def assert_same(found: Dataset, expected: Dataset) -> None:
    for a, b in ((found.train, expected.train), (found.test, expected.test)):
        assert np.array_equal(pixels(a), pixels(b)) and np.array_equal(a.labels, b.labels)
    assert found.class_names == expected.class_names


@pytest.mark.parametrize("channels", [1, 3])
def test_beton_files_give_back_every_image_and_label(
    ffcv: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, channels: int
) -> None:
    path = made_npz(tmp_path / "source.npz", channels=channels)
    target = tmp_path / "new" / "set"
    assert run("npz", "--data", path, "--to", target, "--check") == 0
    expected, found = load_dataset("npz", path), load_dataset("beton", target)
    assert isinstance(found.train.images, BetonImages)
    assert_same(found, expected)
    description = json.loads((target / "dataset.json").read_text())
    assert description["class_names"] == ["0", "1", "2", "3"] and description["source"] == "npz"
    assert description["train"]["counts"] == [40] * 4 and description["test"]["images"] == 24
    assert description["image_shape"] == [8, 8, channels] and description["longtail"] is None
    digest = hashlib.sha256(np.array([160, 8, 8, channels], "<i8").tobytes())
    digest.update(expected.train.labels.tobytes() + pixels(expected.train).tobytes())
    assert description["train"]["fingerprint"] == digest.hexdigest()
    assert sorted(os.listdir(tmp_path / "new")) == ["set"]
    said = f"{target} written: 160 training and 24 test images of 8x8x{channels}, 40 to 40 a class"
    assert capsys.readouterr().out == f"{said} for training, checked\n"


def test_ffcv_reads_what_was_written(
    ffcv: None, monkeypatch: pytest.MonkeyPatch, source: list[str], tmp_path: Path
) -> None:
    from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline.compiler import Compiler

    monkeypatch.setattr(Compiler, "is_enabled", False)  # compiling takes seconds
    assert run(*source, "--to", tmp_path / "set") == 0
    loader = Loader(
        str(tmp_path / "set" / "train.beton"),
        batch_size=160,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]},
    )
    ((images, labels),) = loader
    expected = load_dataset(source[0], Path(source[2])).train
    assert np.array_equal(images, pixels(expected))
    assert np.array_equal(labels[:, 0], expected.labels)


def test_jpeg_is_what_encoding_the_source_gives(
    ffcv: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    steps = np.linspace(0, 255, 32).astype(np.uint8)  # smooth, so that JPEG loses little
    images = np.stack([np.roll(np.add.outer(steps // 2, steps // 2), at) for at in range(8)])
    images = np.repeat(images[..., None], 3, 3)
    labels = np.arange(8) % 2
    np.savez(tmp_path / "a.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    flags = ["npz", "--data", tmp_path / "a.npz", "--field", "jpg", "--check", "--to"]
    noise: dict[int, float] = {}
    for quality in (30, 95):
        target = tmp_path / str(quality)
        assert run(*flags, target, "--quality", quality) == 0
        found = pixels(load_dataset("beton", target).train)
        noise[quality] = float(np.square(found.astype(float) - images).mean())
        ratio = 10 * np.log10(255**2 / noise[quality])  # test images are the training images
        assert f"checked: JPEG at {ratio:.1f} dB PSNR" in capsys.readouterr().out
    assert 0 < noise[95] < noise[30]


def test_npz_is_read_back_and_the_same_data_gives_the_same_bytes(
    source: list[str], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        assert run(*source, "--to", tmp_path / f"{name}.npz", "--check") == 0
    expected = load_dataset("npz", Path(source[2]))
    assert_same(load_dataset("npz", tmp_path / "a.npz"), expected)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_the_long_tail_is_applied_or_kept_as_an_index(
    ffcv: None, source: list[str], tmp_path: Path
) -> None:
    whole = load_dataset("npz", Path(source[2]))
    counts = longtail_counts(30, 4, 0.1)
    rows = longtail_indices(whole.train.labels, counts, seed=5)
    flags = [*source, "--imbalance", 0.1, "--largest", 30, "--split-seed", 5, "--check"]
    assert run(*flags, "--to", tmp_path / "applied") == 0
    assert run(*flags, "--to", tmp_path / "index", "--split", "index") == 0
    assert run(*flags, "--to", tmp_path / "applied.npz") == 0
    assert np.load(tmp_path / "index" / "train-indices.npy").tolist() == rows.tolist()
    for name, place in (("beton", "applied"), ("beton", "index"), ("npz", "applied.npz")):
        found = load_dataset(name, tmp_path / place)
        assert np.array_equal(pixels(found.train), pixels(whole.train)[rows])
        assert found.train.labels.tolist() == whole.train.labels[rows].tolist()
    written = {
        name: json.loads((tmp_path / name / "dataset.json").read_text())
        for name in ("applied", "index")
    }
    assert written["applied"]["train"]["images"] == sum(counts)
    assert written["index"]["train"]["images"] == 160
    for name, description in written.items():
        assert description["longtail"] == {
            "imbalance": 0.1,
            "imbalance_profile": "exp",
            "largest": 30,
            "split": "index" if name == "index" else "apply",
            "split_seed": 5,
            "counts": counts,
        }


def test_image_files_are_converted_and_damaged_ones_named_or_left_out(
    ffcv: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made = np.random.default_rng(0)
    lines = []
    for number in range(6):
        image = made.integers(0, 256, (10 + number, 20, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        lines.append(f"{number}.png {number % 2}\n")
    for name in ("train.txt", "test.txt"):
        (tmp_path / name).write_text("".join(lines))
    flags = ["list", "--data", tmp_path, "--image-size", 8, "--check", "--to"]
    assert run(*flags, tmp_path / "set") == 0
    expected = load_dataset("list", tmp_path, image_size=8)
    assert_same(load_dataset("beton", tmp_path / "set"), expected)
    for number in (1, 4):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    capsys.readouterr()
    for target in (tmp_path / "bad", tmp_path / "bad.npz"):
        message = error_of(capsys, *flags, target)
        assert message.startswith("2 of 6 images cannot be decoded: ")
        assert "1.png: " in message and "4.png: " in message and "--skip-bad" in message
        assert not list(tmp_path.glob("bad*"))
    assert run(*flags, tmp_path / "rest", "--skip-bad") == 0
    assert capsys.readouterr().err.count("left out 2 of 6 images that cannot be decoded: ") == 2
    assert load_dataset("beton", tmp_path / "rest").train.labels.tolist() == [0, 0, 1, 1]


# What may be replaced, and when


@pytest.mark.parametrize("name", ["set", "set.npz"])
def test_a_conversion_is_replaced_only_by_force_and_only_by_a_whole_one(
    ffcv: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: list[str],
    tmp_path: Path,
    name: str,
) -> None:
    target = tmp_path / "out" / name
    kind = "beton" if name == "set" else "npz"
    assert run(*source, "--to", target, "--imbalance", 0.5) == 0
    kept = load_dataset(kind, target)
    capsys.readouterr()
    assert error_of(capsys, *source, "--to", target) == (
        f"--to {target}: is there already; replace it with --force"
    )
    with monkeypatch.context() as broken:
        broken.setattr(convert, "check", fail(DataError("image 3 differs")))
        assert error_of(capsys, *source, "--to", target, "--force", "--check") == "image 3 differs"
        broken.setattr(convert, "check", fail(KeyboardInterrupt()))
        assert run(*source, "--to", target, "--force", "--check") == 130
    assert_same(load_dataset(kind, target), kept)
    assert os.listdir(tmp_path / "out") == [name]
    assert run(*source, "--to", target, "--force") == 0
    assert_same(load_dataset(kind, target), load_dataset("npz", Path(source[2])))
    assert os.listdir(tmp_path / "out") == [name]


def test_a_conversion_that_cannot_be_moved_into_place_leaves_the_earlier_one(
    ffcv: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: list[str],
    tmp_path: Path,
) -> None:
    target = tmp_path / "out" / "set"
    assert run(*source, "--to", target, "--imbalance", 0.5) == 0
    kept = load_dataset("beton", target)
    capsys.readouterr()
    let_the_second_rename_fail(monkeypatch)
    message = error_of(capsys, *source, "--to", target, "--force")
    assert message == f"{target}: cannot be written (Input/output error); nothing was kept"
    assert_same(load_dataset("beton", target), kept)
    assert os.listdir(tmp_path / "out") == ["set"]


def fail(error: BaseException) -> Callable[..., Any]:
    def raising(*_: object) -> None:
        raise error

    return raising


def test_nothing_but_a_conversion_is_ever_replaced(
    ffcv: None, capsys: pytest.CaptureFixture[str], source: list[str], tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").touch()
    message = f"--to {full}: holds thesis.tex, no conversion; name another folder"
    assert error_of(capsys, *source, "--to", full, "--force") == message
    assert "is a file; name another" in error_of(capsys, *source, "--to", full / "thesis.tex")
    (tmp_path / "folder.npz").mkdir()
    assert "is a folder; name another" in error_of(capsys, *source, "--to", tmp_path / "folder.npz")
    (tmp_path / "set.part").mkdir()
    (tmp_path / "set.part" / "mine.txt").touch()
    assert "cannot be written" in error_of(capsys, *source, "--to", tmp_path / "set")
    assert (tmp_path / "set.part" / "mine.txt").exists() and (full / "thesis.tex").exists()
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "empty.part").mkdir()
    (tmp_path / "empty.part" / "train.beton").touch()  # of a conversion that was killed
    assert run(*source, "--to", empty) == 0
    assert sorted(os.listdir(empty)) == ["dataset.json", "test.beton", "train.beton"]


# Disks that fill up


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("set", 100),  # the header
        ("set", 1 << 20),  # the padding before the first page
        ("set", 5 << 19),  # the first page, cut short
        ("set", 17 << 18),  # the second, which FFCV would not notice
        ("set", (8 << 20) + 100),  # the table at the end
        ("set.npz", 100),
        ("set.npz", 2 << 20),
        ("set.npz", 4_335_000),  # the labels
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing(
    ffcv: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, limit: int
) -> None:
    """A limit on the size of files stands for the disk: writes come short first, then fail."""
    labels = np.arange(900) % 3
    images = np.random.default_rng(0).integers(0, 256, (900, 40, 40, 3), np.uint8)
    path, target = tmp_path / "source.npz", tmp_path / "out" / name
    np.savez(path, x_train=images, y_train=labels, x_test=images[:3], y_test=labels[:3])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        message = error_of(capsys, "npz", "--data", path, "--to", target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert message.startswith(f"{target}: cannot be written (")
    assert message.endswith("); nothing was kept")
    assert not list(target.parent.iterdir())
    assert run("npz", "--data", path, "--to", target) == 0


def test_a_conversion_that_a_scheduler_ends_leaves_nothing(
    source: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ended(place: Path, *_: object) -> None:
        place.write_text("half")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(convert, "write_npz", ended)
    assert run(*source, "--to", tmp_path / "to" / "made.npz") == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "stopped\n" and not list((tmp_path / "to").iterdir())


def test_check_finds_one_wrong_pixel_and_one_wrong_label(ffcv: None, source: list[str]) -> None:
    whole = load_dataset("npz", Path(source[2]))
    place = Path(source[2]).parent / "set"
    parts = {"train": whole.train, "test": whole.test}
    beton_folder.write(place, parts, {"class_names": list(whole.class_names)})
    assert convert.check(place, parts) == float("inf")
    images, labels = pixels(whole.test).copy(), whole.test.labels.copy()
    images[17, 3, 4, 1] ^= 1
    with pytest.raises(DataError, match=r"test.beton: image 17 differs from the source"):
        convert.check(place, {**parts, "test": ImageSet(images, labels)})
    labels[17] ^= 1
    with pytest.raises(DataError, match=r"test.beton: labels differ from the source"):
        convert.check(place, {**parts, "test": ImageSet(whole.test.images, labels)})


# Bad input


FLAGS = {
    "no target": ([], "--to"),
    "unknown source": (["mnist", "--to", "a"], "SOURCE mnist: is unknown; give one of cifar10"),
    "no path": (["folder", "--to", "a"], "dataset folder needs --data FOLDER of train/CLASS"),
    "quality": (["npz", "--to", "a", "--quality", "0"], "--quality 0: not in 1..100"),
    "field": (["npz", "--to", "a", "--field", "webp"], "--field"),
    "npz jpg": (["npz", "--to", "a.npz", "--field", "jpg"], "--field jpg: an .npz keeps plain"),
    "npz index": (["npz", "--to", "a.npz", "--split", "index"], "--split index: needs a folder"),
    "index": (["npz", "--to", "a", "--split", "index"], "--split index: needs --imbalance"),
    "largest": (["npz", "--to", "a", "--largest", "5"], "--largest: needs --imbalance"),
    "seed": (["npz", "--to", "a", "--split-seed", "3"], "--split-seed: needs --imbalance"),
    "no jpg": (["npz", "--to", "a", "--quality", "50"], "--quality: needs --field jpg"),
}


@pytest.mark.parametrize(("arguments", "message"), FLAGS.values(), ids=FLAGS)
def test_bad_flags_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    with_target = [str(tmp_path / value) if value[0] == "a" else value for value in arguments]
    assert message in error_of(capsys, *with_target)
    assert not list(tmp_path.iterdir())


def test_values_that_do_not_fit_the_data_are_one_line(
    ffcv: None, capsys: pytest.CaptureFixture[str], source: list[str], tmp_path: Path
) -> None:
    target = ["--to", str(tmp_path / "out" / "set")]
    for flags, message in (
        (["--imbalance", "2"], "--imbalance 2.0: must lie in (0, 1]"),
        (["--imbalance", "0.001"], "leaves class 2 empty"),
        (["--imbalance", "0.5", "--largest", "99"], "class 0 has 40 images, 99 asked"),
        (["--imbalance", "0.5", "--split-seed", "-1"], "--split-seed -1: must lie in [0, 2^32)"),
        (["--image-size", "8"], "--image-size: the images of npz have one size already"),
    ):
        assert message in error_of(capsys, *source, *target, *flags)
    grey = made_npz(tmp_path / "grey.npz", channels=1)
    flags = ["npz", "--data", grey, *target, "--field", "jpg"]
    assert error_of(capsys, *flags).startswith("--field jpg: FFCV keeps RGB images only as JPEG")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_without_ffcv_the_pip_line_is_given_and_npz_still_works(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    source: list[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setitem(sys.modules, "ffcv", None)
    monkeypatch.setitem(sys.modules, "ffcv.writer", None)
    message = error_of(capsys, *source, "--to", tmp_path / "set")
    assert "scripts/ffcv.sh, or convert to FILE.npz" in message
    assert not list(tmp_path.glob("set*"))
    assert run(*source, "--to", tmp_path / "set.npz") == 0


# Reading a damaged conversion


def test_a_damaged_folder_is_refused_in_one_line(
    ffcv: None, source: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "set"
    assert run(*source, "--to", folder, "--imbalance", 0.5, "--split", "index") == 0

    def refusal(file: str, content: bytes | None) -> str:
        """Replace a file, or remove it, read the folder, and put the file back."""
        good = (folder / file).read_bytes()
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        with pytest.raises(DataError) as caught:
            load_dataset("beton", folder)
        (folder / file).write_bytes(good)
        message = str(caught.value)
        assert message.startswith(f"{folder}/{file}") and "\n" not in message
        return message

    def saved(array: npt.ArrayLike) -> bytes:
        np.save(tmp_path / "rows.npy", array)
        return (tmp_path / "rows.npy").read_bytes()

    good = json.loads((folder / "dataset.json").read_text())
    assert "not found; give the folder that" in refusal("dataset.json", None)
    for change, message in (
        ({"version": 2}, "is of version 2, not 1; convert the set again"),
        ({"class_names": "abcd"}, "class_names is no list of names"),
        ({"class_names": [1, 2, 3, 4]}, "class_names is no list of names"),
        ({"test": {"images": "24"}}, "images is no number"),
        ({"test": {}}, "cannot be read ('images')"),
        ({"test": None}, "cannot be read"),
    ):
        assert message in refusal("dataset.json", json.dumps(good | change).encode())
    assert "cannot be read" in refusal("dataset.json", b"[1, 2]")
    assert "cannot be read" in refusal("dataset.json", b'{"version": 1')
    other = (folder / "train.beton").read_bytes()
    assert "160 images, dataset.json says 24" in refusal("test.beton", other)
    assert refusal("test.beton", b"") and refusal("train.beton", None)
    for rows in ([-1, 0], [0, 160], [3, 3], [[0, 1]], [0.5], []):
        assert "cannot be read (" in refusal("train-indices.npy", saved(rows))
    assert "cannot be read (" in refusal("train-indices.npy", b"no array")
    assert len(load_dataset("beton", folder).train) == sum(longtail_counts(40, 4, 0.5))


def test_no_damage_to_the_description_gives_anything_but_an_error(
    ffcv: None, source: list[str], tmp_path: Path
) -> None:
    assert run(*source, "--to", tmp_path / "set") == 0
    file = tmp_path / "set" / "dataset.json"
    refused = 0
    for damaged in mutated(file.read_bytes(), 200):
        file.write_bytes(damaged)
        refused += refused_or_valid(lambda: load_dataset("beton", tmp_path / "set"))
    assert refused > 50


def test_a_conversion_never_takes_the_place_of_its_source(
    capsys: pytest.CaptureFixture[str], source: list[str]
) -> None:
    file = Path(source[-1])
    kept = file.read_bytes()
    message = f"--to {file}: is the source itself; name another place"
    assert error_of(capsys, *source, "--to", file, "--imbalance", 0.5, "--force") == message
    assert file.read_bytes() == kept

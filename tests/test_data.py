"""Data sets: what is accepted, what is refused and how; splits held against the official code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reat_fast import data
from reat_fast.data import (
    DataError,
    Dataset,
    ImageSet,
    head_body_tail,
    held_out_split,
    load_dataset,
    longtail_counts,
    longtail_indices,
    make_splits,
)
from reat_fast.sources import download
from reat_fast.sources.lazy import LazyImages

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def empty_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let no data set of this machine be found."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("REAT_FAST_DATA", raising=False)
    monkeypatch.setattr(download, "_DEBIAN", tmp_path / "debian")


def arrays(
    train: int = 20, test: int = 8, classes: int = 4, **changed: object
) -> dict[str, object]:
    """Return the content of a small valid .npz, every class present, with some arrays changed."""
    random = np.random.default_rng(0)
    content: dict[str, object] = {
        "x_train": random.integers(0, 256, (train, 6, 5, 3), np.uint8),
        "y_train": np.arange(train) % classes,
        "x_test": random.integers(0, 256, (test, 6, 5, 3), np.uint8),
        "y_test": np.arange(test) % classes,
    }
    return content | changed


def save(path: Path, content: dict[str, object]) -> Path:
    np.savez(path, **content)
    return path


def made_dataset(sizes: list[int], seed: int = 0) -> Dataset:
    """Return a data set with sizes[c] training images of class c, in mixed order."""
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    images = np.arange(len(labels), dtype=np.uint32).view(np.uint8).reshape(-1, 2, 2, 1)
    train = ImageSet(images, labels)
    names = tuple(f"class {label}" for label in range(len(sizes)))
    return Dataset("made", train, train.take(np.arange(len(sizes))), names)


# The official procedure, stated again from its text: global numpy generator, lists.


def official_counts(size: int, num_classes: int, imbalance: float, profile: str) -> list[int]:
    largest = size / num_classes
    if profile == "exp":
        powers = [label / (num_classes - 1.0) for label in range(num_classes)]
        return [int(largest * (imbalance**power)) for power in powers]
    half = num_classes // 2
    return [int(largest)] * half + [int(largest * imbalance)] * half


def official_indices(labels: list[int], counts: list[int]) -> list[int]:
    targets = np.array(labels, dtype=np.int64)
    kept: list[int] = []
    for label, count in zip(np.unique(targets), counts, strict=True):
        members = np.where(targets == label)[0]
        np.random.shuffle(members)
        kept.extend(members[:count])
    return kept


@given(
    largest=st.integers(1, 6000),
    num_classes=st.integers(2, 120),
    imbalance=st.floats(0.001, 1.0),
    profile=st.sampled_from(["exp", "step"]),
)
def test_counts_are_the_official_ones_or_name_the_empty_class(
    largest: int, num_classes: int, imbalance: float, profile: str
) -> None:
    num_classes += num_classes % 2 if profile == "step" else 0
    expected = official_counts(largest * num_classes, num_classes, imbalance, profile)
    if 0 in expected:
        with pytest.raises(DataError, match=f"class {expected.index(0)} empty"):
            longtail_counts(largest, num_classes, imbalance, profile)
    else:
        assert longtail_counts(largest, num_classes, imbalance, profile) == expected


@pytest.mark.parametrize(
    ("ratio", "cifar10", "cifar100"),
    [(10, 20431, 19573), (20, 17023, 15907), (50, 13996, 12608), (100, 12406, 10847)],
)
def test_counts_add_up_to_the_sizes_of_the_literature(
    ratio: int, cifar10: int, cifar100: int
) -> None:
    assert sum(longtail_counts(5000, 10, 1 / ratio)) == cifar10
    assert sum(longtail_counts(500, 100, 1 / ratio)) == cifar100


def test_counts_of_one_class_and_of_an_odd_step_keep_every_class() -> None:
    assert longtail_counts(7, 1, 0.1) == longtail_counts(7, 1, 0.1, "step") == [7]
    assert longtail_counts(100, 5, 0.1, "step") == [100, 100, 10, 10, 10]
    assert longtail_counts(9, 3, 1) == [9, 9, 9]


@pytest.mark.parametrize("imbalance", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_imbalance_outside_its_range_is_named(imbalance: float) -> None:
    with pytest.raises(DataError, match="--imbalance .*: must lie in"):
        longtail_counts(100, 10, imbalance)


def test_counts_name_a_wrong_size_profile_or_empty_class() -> None:
    with pytest.raises(DataError, match="largest and num_classes must be positive"):
        longtail_counts(0, 10, 0.5)
    with pytest.raises(DataError, match="profile must be exp or step, got 'linear'"):
        longtail_counts(100, 10, 0.5, "linear")
    with pytest.raises(DataError, match=r"leaves class 8 empty; raise it above 1/20"):
        longtail_counts(20, 10, 0.03)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(0, 2**32 - 1), st.data())
def test_indices_are_bit_for_bit_the_official_ones(
    sizes: list[int], seed: int, draw: st.DataObject
) -> None:
    labels = made_dataset(sizes, seed % 1000).train.labels
    counts = [draw.draw(st.integers(1, size)) for size in sizes]
    before = np.random.get_state()
    np.random.seed(seed)
    expected = official_indices(labels.tolist(), counts)
    np.random.set_state(before)
    indices = longtail_indices(labels, counts, seed)
    assert indices.dtype == np.int64
    assert indices.tolist() == expected


def test_indices_leave_the_global_generator_alone() -> None:
    np.random.seed(5)
    expected = np.random.rand()
    np.random.seed(5)
    longtail_indices(np.arange(100) % 10, [3] * 10)
    held_out_split(np.arange(100) % 10)
    assert np.random.rand() == expected


def test_indices_name_the_class_that_is_too_small_and_labels_without_count() -> None:
    with pytest.raises(DataError, match="class 1 has 2 images, 3 asked"):
        longtail_indices(np.array([0, 0, 0, 1, 1]), [3, 3])
    with pytest.raises(DataError, match=r"labels go 0\.\.2, counts has 2 classes"):
        longtail_indices(np.array([0, 1, 2]), [1, 1])
    with pytest.raises(DataError, match="seed must be in"):
        longtail_indices(np.array([0, 1]), [1, 1], seed=-1)
    for odd in (0.5, np.nan):
        with pytest.raises(DataError, match="labels must be whole numbers"):
            longtail_indices(np.array([0.0, 1.0, odd]), [1, 1])
    assert longtail_indices(np.array([0.0, 1.0]), [1, 1]).tolist() == [0, 1]


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.floats(0, 0.99),
    st.integers(0, 2**32 - 1),
)
def test_held_out_takes_a_share_of_each_class_and_never_its_last_image(
    sizes: list[int], fraction: float, seed: int
) -> None:
    labels = made_dataset(sizes).train.labels
    train, held = held_out_split(labels, fraction, seed)
    assert sorted([*train, *held]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all() and (np.diff(held) > 0).all()
    for label, size in enumerate(sizes):
        wanted = max(1, round(fraction * size)) if fraction else 0
        assert (labels[held] == label).sum() == min(wanted, size - 1)
    again = held_out_split(labels, fraction, seed)
    assert np.array_equal(train, again[0]) and np.array_equal(held, again[1])


def test_held_out_is_drawn_apart_from_the_subset() -> None:
    labels = np.zeros(1000, np.int64)
    held = held_out_split(labels, 0.1, seed=0)[1]
    drawn = longtail_indices(labels, [100], seed=0)
    # Independent draws of 100 in 1000 share 10 with a deviation of 2.85; the same draw shares 100.
    assert len(np.intersect1d(held, drawn)) < 30
    assert not np.array_equal(held, held_out_split(labels, 0.1, seed=1)[1])


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_held_out_fraction_outside_its_range_is_named(fraction: float) -> None:
    with pytest.raises(DataError, match="held_out must be a fraction"):
        held_out_split(np.zeros(4, np.int64), fraction)


def test_splits_hold_the_official_subset_apart_from_its_held_out_part() -> None:
    dataset = made_dataset([40] * 5)
    splits = make_splits(dataset, imbalance=0.1, held_out=0.1, seed=3)
    np.random.seed(3)
    subset = official_indices(dataset.train.labels.tolist(), official_counts(200, 5, 0.1, "exp"))
    assert sorted([*splits.train_indices, *splits.held_out_indices]) == sorted(subset)
    in_train = np.isin(subset, splits.train_indices)
    assert np.array_equal(np.array(subset)[in_train], splits.train_indices)
    assert not np.intersect1d(splits.train_indices, splits.held_out_indices).size
    assert splits.counts == np.bincount(splits.train.labels).tolist()
    assert np.array_equal(splits.train.images, dataset.train.images[splits.train_indices])
    assert np.array_equal(splits.held_out.labels, dataset.train.labels[splits.held_out_indices])
    assert set(splits.held_out.labels.tolist()) == set(range(5))
    assert splits.test is dataset.test


def test_splits_without_held_out_part_are_the_official_subset_in_its_order() -> None:
    dataset = made_dataset([30] * 4)
    splits = make_splits(dataset, imbalance=0.2, held_out=0)
    np.random.seed(0)
    expected = official_indices(dataset.train.labels.tolist(), official_counts(120, 4, 0.2, "exp"))
    assert splits.train_indices.tolist() == expected
    assert len(splits.held_out) == 0 and splits.held_out.images.shape == (0, 2, 2, 1)


def test_largest_caps_the_head_and_is_the_smallest_class_by_default() -> None:
    dataset = made_dataset([40, 25, 31])
    assert make_splits(dataset, imbalance=1, held_out=0).counts == [25, 25, 25]
    assert make_splits(dataset, imbalance=0.1, largest=10, held_out=0).counts == [10, 3, 1]
    with pytest.raises(DataError, match="class 0 has 40 images, 50 asked"):
        make_splits(dataset, imbalance=0.1, largest=50)


def test_fingerprint_changes_with_whatever_changes_the_split() -> None:
    dataset = made_dataset([40] * 3)
    asked = [
        {"imbalance": 0.1},
        {"imbalance": 0.1, "seed": 1},
        {"imbalance": 0.2},
        {"imbalance": 0.1, "held_out": 0.2},
        {"imbalance": 0.1, "profile": "step"},
        {"imbalance": 0.1, "largest": 30},
    ]
    prints = [make_splits(dataset, **flags).fingerprint for flags in asked]  # type: ignore[arg-type]
    assert len(set(prints)) == len(asked)
    assert make_splits(dataset, imbalance=0.1).fingerprint == prints[0]
    mirrored = ImageSet(dataset.train.images, 2 - dataset.train.labels)
    other = Dataset("made", mirrored, dataset.test, dataset.class_names)
    assert make_splits(other, imbalance=0.1).fingerprint not in prints


def test_a_known_split_keeps_its_fingerprint() -> None:
    # Frozen: another value means that the runs people saved no longer match their data.
    images = ImageSet(np.zeros((60, 1, 1, 1), np.uint8), np.arange(60) % 3)
    splits = make_splits(Dataset("made", images, images, ("a", "b", "c")), imbalance=0.1)
    assert splits.held_out_indices.tolist() == [39, 37, 41]
    assert splits.fingerprint == "3f4e1eeb6371171ddb0ba5d6b1f57b72733f931dc268bfa6a649ea040c1eb5e5"


def test_a_set_that_is_long_tailed_already_is_taken_as_it_is() -> None:
    dataset = made_dataset([30, 12, 3])
    splits = make_splits(dataset, imbalance=0.5, profile="as-is", held_out=0)
    assert splits.train_indices.tolist() == list(range(45)) and splits.counts == [30, 12, 3]
    assert (
        splits.fingerprint
        == make_splits(dataset, imbalance=0.01, profile="as-is", held_out=0, seed=4).fingerprint
    )
    held = make_splits(dataset, imbalance=0.5, profile="as-is", held_out=0.2)
    assert held.counts == [24, 10, 2]
    assert sorted([*held.train_indices, *held.held_out_indices]) == list(range(45))
    with pytest.raises(DataError, match="--largest: a set that is taken as-is has every image"):
        make_splits(dataset, imbalance=0.5, profile="as-is", largest=30)
    with pytest.raises(
        DataError, match="--imbalance 0.1: .* already, 30 to 3 images a class; take it as it is"
    ):
        make_splits(dataset, imbalance=0.1)
    assert make_splits(dataset, imbalance=0.25, largest=12, held_out=0).counts == [12, 6, 3]


@pytest.mark.parametrize("profile", ["exp", "as-is"])
def test_a_set_of_one_class_is_refused(profile: str) -> None:
    with pytest.raises(DataError, match="one class, .*, is nothing to tell apart; --data"):
        make_splits(made_dataset([30]), imbalance=0.5, profile=profile)


class Kept(LazyImages):
    """Give the images of an array and keep which were read."""

    def __init__(self, pixels: np.ndarray) -> None:
        super().__init__(pixels.shape)
        self.pixels = pixels
        self.seen: list[int] = []

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.seen += indices.tolist()
        return self.pixels[indices]


def test_lazy_images_are_split_like_an_array_and_none_is_read() -> None:
    dataset = made_dataset([40] * 5)
    pixels = np.asarray(dataset.train.images)
    images = Kept(pixels)
    lazy = Dataset("made", ImageSet(images, dataset.train.labels), dataset.test, ("a",) * 5)
    expected, found = (make_splits(which, imbalance=0.1, seed=3) for which in (dataset, lazy))
    assert found.fingerprint == expected.fingerprint
    assert isinstance(found.train.images, LazyImages) and not images.seen
    assert np.array_equal(found.train.images[:], expected.train.images[:])
    assert np.array_equal(found.held_out.images[3:5], expected.held_out.images[3:5])
    assert images.seen == [*found.train_indices, *found.held_out_indices[3:5]]


@given(st.integers(1, 1000))
def test_head_body_and_tail_tile_the_classes_with_the_official_tail(num_classes: int) -> None:
    parts = head_body_tail(num_classes)
    assert list(parts) == ["head", "body", "tail"]
    assert parts["head"] + parts["body"] + parts["tail"] == list(range(num_classes))
    official = list(range(num_classes // 3 * 2 + 1, num_classes))
    assert parts["tail"] == (official or [num_classes - 1])
    if num_classes > 1:
        assert parts["head"]


def test_classes_of_ones_own_set_are_taken_by_falling_size() -> None:
    counts = [5, 90, 40, 40, 1, 70]
    assert head_body_tail(6, counts) == {"head": [1, 5], "body": [2, 3, 0], "tail": [4]}
    assert head_body_tail(6, sorted(counts, reverse=True)) == head_body_tail(6)
    assert head_body_tail(6, [7] * 6) == head_body_tail(6)


def test_ten_classes_have_the_tail_of_the_official_code() -> None:
    assert head_body_tail(10) == {"head": [0, 1, 2], "body": [3, 4, 5, 6], "tail": [7, 8, 9]}


# Loading


def test_npz_is_read_with_class_names_where_they_fit(tmp_path: Path) -> None:
    path = save(tmp_path / "set.npz", arrays())
    dataset = load_dataset("npz", path)
    assert dataset.class_names == ("0", "1", "2", "3") and dataset.num_classes == 4
    assert dataset.train.images.shape == (20, 6, 5, 3) and dataset.train.images.dtype == np.uint8
    assert dataset.test.labels.dtype == np.int64 and len(dataset.test) == 8
    colour = np.zeros((20, 32, 32, 3), np.uint8)
    ten = save(tmp_path / "ten.npz", arrays(20, 20, 10, x_train=colour, x_test=colour))
    assert load_dataset("cifar10", ten).class_names[9] == "truck"
    named = save(tmp_path / "named.npz", arrays(class_names=np.array(["a", "b", "c", "d"])))
    assert load_dataset("npz", named).class_names == ("a", "b", "c", "d")


def test_an_npz_of_other_classes_than_the_named_set_is_refused(tmp_path: Path) -> None:
    ten = save(tmp_path / "ten.npz", arrays(classes=10))
    colour = np.zeros((20, 32, 32, 3), np.uint8)
    own = {"class_names": np.array([*download.CLASS_NAMES["cifar10"][:9], "lorry"])}
    named = save(tmp_path / "named.npz", arrays(20, 20, 10, x_train=colour, x_test=colour, **own))
    for name, place, found in (
        ("cifar100", ten, "has 10 classes, cifar100 has 100"),
        ("cifar10", ten, "has images of 6x5 in colour, cifar10 has 32x32 in colour"),
        ("fashion-mnist", ten, "has images of 6x5 in colour, fashion-mnist has 28x28 in grey"),
        ("cifar10", named, "has a class lorry where cifar10 has truck"),
    ):
        with pytest.raises(DataError, match=f"^--data {place}: {found}; give --dataset npz$"):
            load_dataset(name, place)


def test_grey_images_and_columns_of_labels_are_accepted(tmp_path: Path) -> None:
    content = arrays()
    for part in ("train", "test"):
        content[f"x_{part}"] = content[f"x_{part}"][..., 0]  # type: ignore[index]
        content[f"y_{part}"] = content[f"y_{part}"][:, None].astype(np.uint8)  # type: ignore[index]
    dataset = load_dataset("npz", save(tmp_path / "grey.npz", content))
    assert dataset.train.images.shape == (20, 6, 5, 1)
    assert dataset.train.labels.shape == (20,) and dataset.train.labels.dtype == np.int64


NAN = np.full((20, 6, 5, 3), np.nan)
BAD = {
    "float images": (
        {"x_train": np.ones((20, 6, 5, 3))},
        "x_train: images must be uint8 0..255, got float64",
    ),
    "fractions": (
        {"x_train": np.full((20, 6, 5, 3), 0.5)},
        r"float64 .*; \(255 \* images\).round\(\).astype",
    ),
    "black and white": (
        {"x_train": np.ones((20, 6, 5, 3), bool)},
        r"got bool .*; \(255 \* images\).round\(\).astype",
    ),
    "normalised": (
        {"x_train": np.full((20, 6, 5, 3), -2.0)},
        "got float64 .* from -2 to -2; undo what was done",
    ),
    "NaN images": ({"x_train": NAN}, "x_train: .* with NaN$"),
    "wide images": ({"x_test": np.zeros((8, 6, 5, 3), np.int64)}, "got int64 .*; astype"),
    "flat images": ({"x_train": np.zeros((20, 90), np.uint8)}, r"x_train: .*\[N, H, W, C\]"),
    "channels first": ({"x_train": np.zeros((20, 3, 6, 5), np.uint8)}, "C 1 or 3, .*; transpose"),
    "four channels": ({"x_test": np.zeros((8, 6, 5, 4), np.uint8)}, r"C 1 or 3, got .*, 4\]$"),
    "no floats": ({"x_test": np.zeros((0, 6, 5, 3))}, r"uint8 .*, got float64 \[0, 6, 5, 3\]$"),
    "no pixels": ({"x_train": np.zeros((20, 0, 5, 3), np.uint8)}, "x_train: .*none of them 0"),
    "other size": ({"x_test": np.zeros((8, 7, 5, 3), np.uint8)}, r"x_test: test images are \(7, 5"),
    "few labels": ({"y_train": np.zeros(19, int)}, r"y_train: .*\[19\] for 20 images"),
    "scalar label": ({"y_train": np.int64(3)}, "y_train: .* for 20 images"),
    "one-hot labels": ({"y_train": np.zeros((20, 4), int)}, r"y_train: .*\[20, 4\]; argmax"),
    "one-hot floats": ({"y_train": np.zeros((20, 4))}, r"y_train: .*\[20, 4\]; argmax"),
    "float labels": ({"y_train": np.arange(20.0) % 4}, "must be integers, .*; astype"),
    "halves": ({"y_train": np.full(20, 0.5)}, "must be integers, .*; number the classes from 0"),
    "NaN labels": ({"y_train": np.full(20, np.nan)}, "y_train: labels .* with NaN"),
    "text labels": ({"y_train": np.array(["a"] * 20)}, "y_train: .* in that order as class_names"),
    "negative labels": ({"y_train": np.arange(20) % 4 - 1}, r"y_train: labels .*got -1\.\.2"),
    "unknown test label": ({"y_test": np.full(8, 4)}, r"y_test: labels must be in 0\.\.3, got 4"),
    "huge label": ({"y_train": np.full(20, 2**62)}, "y_train: class 0 has no image"),
    "first is 1": (
        {name: np.arange(n) % 4 + 1 for name, n in (("y_train", 20), ("y_test", 8))},
        "y_train: labels run from 1 to 4, .* take 1 ",
    ),
    "class gap": ({"y_train": np.arange(20) % 2 * 3}, "y_train: class 1 has no image"),
    "named gap": ({"class_names": np.array(list("abcde"))}, r"y_train: class 4 \(e\) has no image"),
    "few names": ({"class_names": np.array(["a", "b"])}, r"in 0\.\.1, .*; class_names has 2 names"),
    "names as objects": (
        {"class_names": np.array([*"abcd"], object)},
        r"write class_names as numpy.array\(names, str\)",
    ),
    "empty test": ({"x_test": np.zeros((0, 6, 5, 3), np.uint8), "y_test": []}, "x_test: images"),
    "empty train": ({"x_train": np.zeros((0, 6, 5, 3), np.uint8), "y_train": []}, "x_train: ima"),
}


@pytest.mark.parametrize(("changed", "message"), BAD.values(), ids=BAD)
def test_bad_arrays_are_refused_in_one_line_that_names_them(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    path = save(tmp_path / "bad.npz", arrays(**changed))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("npz", path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_named_set_lacking_a_class_says_which(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for stem in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"):
        (folder / f"{stem}.bin").write_bytes(bytes(3073))
    (folder / "test_batch.bin").write_bytes(bytes(3073))
    with pytest.raises(DataError, match=r"class 1 \(automobile\) has no image"):
        load_dataset("cifar10", tmp_path)
    (folder / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(DataError, match=r"test labels\): labels must be in 0\.\.9, got 10"):
        load_dataset("cifar10", tmp_path)


def test_names_and_paths_that_cannot_be_say_what_could(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--dataset mnist: is unknown; give one of cifar10, cif"):
        load_dataset("mnist")
    with pytest.raises(DataError, match="--data .*gone.npz: no such file"):
        load_dataset("npz", tmp_path / "gone.npz")
    with pytest.raises(DataError, match="dataset npz needs --data FILE.npz$"):
        load_dataset("npz")
    with pytest.raises(DataError, match="dataset npz needs --data FILE.npz, got /"):
        load_dataset("npz", tmp_path)
    (made := tmp_path / "made.npz").touch()
    for name in ("folder", "list", "tiny-imagenet", "beton"):
        with pytest.raises(DataError, match=f"dataset {name} needs --data FOLDER"):
            load_dataset(name, made, 8 if name == "list" else None)
    with pytest.raises(DataError, match="dataset folder needs --data FOLDER"):
        load_dataset("folder")
    with pytest.raises(DataError, match="dataset beton needs --data FOLDER written by"):
        load_dataset("beton")
    with pytest.raises(DataError, match="--image-size: the images of cifar10 have one size"):
        load_dataset("cifar10", image_size=16)
    with pytest.raises(DataError, match="--image-size: the images of npz have one size"):
        load_dataset("npz", save(tmp_path / "set.npz", arrays()), image_size=16)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_set_that_is_nowhere_says_where_it_was_sought_and_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("REAT_FAST_DATA", str(tmp_path / "mine"))
    with pytest.raises(DataError) as caught:
        load_dataset(name)
    message = str(caught.value)
    for place in (tmp_path / "mine", "data", tmp_path / "cache" / "reat_fast"):
        assert str(place) in message
    assert ("debian" in message) == (name == "fashion-mnist")
    assert f"`python -m reat_fast.data {name}`" in message and "--data PATH" in message
    assert "\n" not in message
    with pytest.raises(DataError, match=f"{name} not found in {tmp_path} "):
        load_dataset(name, tmp_path)


def write_cifar10(folder: Path, first_pixel: int) -> None:
    folder.mkdir(parents=True)
    batch = b"".join(bytes([label, first_pixel]) + bytes(3071) for label in range(10))
    for stem in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
        (folder / f"{stem}.bin").write_bytes(batch)


def test_named_sets_are_looked_for_in_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def first_pixel(path: Path | None = None) -> int:
        return int(load_dataset("cifar10", path).train.images[0, 0, 0, 0])

    write_cifar10(tmp_path / "cache" / "reat_fast" / "cifar-10-batches-bin", 1)
    assert first_pixel() == 1
    write_cifar10(Path("data") / "cifar-10-batches-bin", 2)
    assert first_pixel() == 2
    write_cifar10(tmp_path / "mine" / "cifar-10-batches-bin", 3)
    monkeypatch.setenv("REAT_FAST_DATA", str(tmp_path / "mine"))
    assert first_pixel() == 3
    write_cifar10(tmp_path / "given", 4)
    assert first_pixel(tmp_path / "given") == 4


# The command


def test_command_downloads_once_and_then_says_already_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    calls = []

    def fetch(name: str, folder: Path) -> Path:
        calls.append((name, folder))
        write_cifar10(folder / "cifar-10-batches-bin", 0)
        return folder / "cifar-10-batches-bin"

    monkeypatch.setattr(download, "fetch_dataset", fetch)
    for verb in ("downloaded", "already there"):
        data.main(["cifar10"])
        place = tmp_path / "cache" / "reat_fast" / "cifar-10-batches-bin"
        counts = "(50 training and 10 test images, 10 classes)"
        assert capsys.readouterr().out == f"cifar10 {verb}: {place} {counts}\n"
    data.main(["cifar10", "--to", str(tmp_path / "elsewhere")])
    assert "downloaded" in capsys.readouterr().out
    assert calls == [("cifar10", download.cache_folder()), ("cifar10", tmp_path / "elsewhere")]


def test_command_lists_what_is_here_and_what_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar10(Path("data") / "cifar-10-batches-bin", 0)
    data.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(data.DATASETS)
    assert "10 classes: data/cifar-10-batches-bin" in lines[0]
    assert "not here" in lines[1] and "--dataset npz --data FILE.npz" in lines[3]


@pytest.mark.parametrize("arguments", [[], ["mnist"], ["npz"], ["cifar10"], ["--lst"]])
def test_command_fails_with_one_line_and_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    def fetch(name: str, folder: Path) -> Path:
        raise DataError(f"{name} could not be fetched")

    monkeypatch.setattr(download, "fetch_dataset", fetch)
    with pytest.raises(SystemExit) as stop:
        data.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not captured.out


def test_module_runs_as_a_program_without_torch_or_pillow(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['PIL'] = None;"
        "sys.argv[1:] = ['--list']; runpy.run_module('reat_fast.data', run_name='__main__')"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cifar10 ") and not done.stderr

"""Readers: what each format holds arrives whole, and no file can do more than be refused."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from damage import MUTATIONS, mutated, refused_or_valid

from reat_fast.sources import cifar, formats
from reat_fast.sources.formats import DataError

RANDOM = np.random.default_rng(0)


def idx_bytes(array: np.ndarray) -> bytes:
    dims = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + dims + array.tobytes()


def batch(size: int = 7, classes: int = 10) -> tuple[np.ndarray, list[int]]:
    """Return rows as CIFAR stores them, uint8 [N, 3072], and labels."""
    rows = RANDOM.integers(0, 256, (size, 3072), np.uint8)
    return rows, [int(label) for label in RANDOM.integers(0, classes, size)]


def as_images(rows: np.ndarray) -> np.ndarray:
    """Return [N, 32, 32, 3] by the definition: red plane, green plane, blue plane, row by row."""
    images = np.empty((len(rows), 32, 32, 3), np.uint8)
    for channel in range(3):
        plane = rows[:, channel * 1024 : (channel + 1) * 1024]
        images[..., channel] = plane.reshape(-1, 32, 32)
    return images


def python2_batch(rows: np.ndarray, labels: list[int], key: str) -> bytes:
    """Return the pickle that Python 2's cPickle wrote, protocol 2: text and bytes are one type."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    number = b"M" + len(rows).to_bytes(2, "little")
    shape = number + b"M" + (3072).to_bytes(2, "little") + b"\x86"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    )
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\0K\1\x87R"
    dtype += b"(K\3" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
    content = rows.tobytes()
    state = b"(K\1" + shape + dtype + b"\x89T" + len(content).to_bytes(4, "little") + content + b"t"
    data = text(b"data") + array + state + b"b"
    listed = text(key.encode()) + b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + data + listed + b"u."


def python3_batch(rows: np.ndarray, labels: list[int], key: str) -> bytes:
    return pickle.dumps({"data": rows, key: labels, "filenames": ["a.png"] * len(rows)}, 2)


CIFAR10 = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]


def cifar10_files() -> dict[str, bytes]:
    return {name: python2_batch(*batch(), "labels") for name in CIFAR10}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def write_tar(path: Path, files: dict[str, bytes], prefix: str = "cifar-10-batches-py/") -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


# IDX


@pytest.mark.parametrize("shape", [(5,), (3, 4, 5), (0, 2, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_is_read_plain_and_packed(tmp_path: Path, shape: tuple[int, ...], packed: bool) -> None:
    array = RANDOM.integers(0, 256, shape, np.uint8)
    content = idx_bytes(array)
    (tmp_path / "file").write_bytes(gzip.compress(content) if packed else content)
    assert np.array_equal(formats.read_idx(tmp_path / "file"), array)
    assert formats.read_idx(tmp_path / "file").shape == shape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\0\0", "not an IDX file"),
        (b"<html>", "not an IDX file"),
        (bytes([0, 0, 13, 1]) + b"\0\0\0\1abcd", "not an IDX file"),  # floats
        (idx_bytes(np.zeros((3, 4), np.uint8))[:-1], "truncated, 23 bytes of 24"),
        (idx_bytes(np.zeros((3, 4), np.uint8))[:6], "truncated"),
        (idx_bytes(np.zeros((3, 4), np.uint8)) + b"x", "too long, 25 bytes of 24"),
        (gzip.compress(idx_bytes(np.zeros(9, np.uint8)), mtime=0)[:-9], "cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "train").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        formats.read_idx(tmp_path / "train")
    assert str(caught.value).startswith(str(tmp_path / "train"))


def fashion_files() -> dict[str, np.ndarray]:
    shapes = [(6, 28, 28), (6,), (4, 28, 28), (4,)]
    random = [RANDOM.integers(0, 10, shape, np.uint8) for shape in shapes]
    return dict(zip(formats.IDX_FILES, random, strict=True))


@pytest.mark.parametrize("under", [".", "fashion-mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_and_read_from_a_mixed_folder(tmp_path: Path, under: str) -> None:
    arrays = fashion_files()
    folder = tmp_path / under
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, array) in enumerate(arrays.items()):
        assert formats.find_idx(tmp_path) is None  # until all four are there
        if number % 2:
            (folder / name).write_bytes(idx_bytes(array))
        else:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    assert formats.find_idx(tmp_path) == folder
    source = formats.read_idx_folder(folder)
    for read, array in zip(source.arrays, arrays.values(), strict=True):
        assert np.array_equal(read, array)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte.gz: not found"):
        formats.read_idx_folder(folder)


@pytest.mark.parametrize("packed", [False, True])
def test_no_damage_to_an_idx_file_gives_anything_but_an_error(tmp_path: Path, packed: bool) -> None:
    content = idx_bytes(RANDOM.integers(0, 256, (3, 4, 5), np.uint8))
    refused = 0
    for damaged in mutated(gzip.compress(content) if packed else content):
        (tmp_path / "file").write_bytes(damaged)
        refused += refused_or_valid(lambda: formats.read_idx(tmp_path / "file"))
    assert refused > MUTATIONS // 3


# CIFAR


@pytest.mark.parametrize("write", [python2_batch, python3_batch])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_python_version_is_read(
    tmp_path: Path, write: Callable[..., bytes], packed: bool
) -> None:
    batches = {name: batch() for name in CIFAR10}
    files = {name: write(rows, labels, "labels") for name, (rows, labels) in batches.items()}
    if packed:
        place = write_tar(tmp_path / "cifar-10-python.tar.gz", files)
    else:
        place = write_folder(tmp_path / "cifar-10-batches-py", files)
    assert cifar.find_cifar(tmp_path, 10) == cifar.find_cifar(place, 10) == place
    x_train, y_train, x_test, y_test = cifar.read_cifar(place, 10).arrays
    rows = np.concatenate([batches[name][0] for name in CIFAR10[:-1]])
    assert np.array_equal(x_train, as_images(rows)) and x_train.flags.c_contiguous
    assert y_train.tolist() == sum((batches[name][1] for name in CIFAR10[:-1]), [])
    assert np.array_equal(x_test, as_images(batches["test_batch"][0]))
    assert y_test.tolist() == batches["test_batch"][1]


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_cifar100_python_version_gives_the_fine_labels(tmp_path: Path, protocol: int) -> None:
    rows, fine = batch(9, 100)
    content = {"data": np.asfortranarray(rows), "coarse_labels": [0] * 9, "fine_labels": fine}
    files = {name: pickle.dumps(content, protocol) for name in ("train", "test")}
    x_train, y_train, _, y_test = cifar.read_cifar(write_folder(tmp_path, files), 100).arrays
    assert np.array_equal(x_train, as_images(rows))
    assert y_train.tolist() == y_test.tolist() == fine


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_binary_version_is_read(tmp_path: Path, packed: bool, classes: int) -> None:
    rows, labels = batch(5, classes)
    coarse = b"\x07" if classes == 100 else b""
    content = b"".join(
        coarse + bytes([label]) + row.tobytes() for row, label in zip(rows, labels, strict=True)
    )
    names = CIFAR10 if classes == 10 else ["train", "test"]
    files = {f"{name}.bin": content for name in names}
    place = tmp_path / f"cifar-{classes}-binary.tar.gz"
    if packed:
        write_tar(place, files, "cifar/")
    else:
        place = write_folder(tmp_path, files)
    assert cifar.find_cifar(tmp_path, classes) == place
    x_train, y_train, x_test, y_test = cifar.read_cifar(place, classes).arrays
    assert np.array_equal(x_test, as_images(rows)) and y_test.tolist() == labels
    assert np.array_equal(x_train[-5:], as_images(rows)) and y_train[-5:].tolist() == labels


def test_cifar_faults_name_the_file(tmp_path: Path) -> None:
    files = cifar10_files()
    rows, labels = batch()
    faults = {
        "missing": (
            None,
            "data_batch_3 is missing \\(found: data_batch_1, data_batch_2, data_batch_4",
        ),
        "truncated": (files["data_batch_3"][:-500], "data_batch_3: cannot be read"),
        "no dictionary": (
            pickle.dumps([1], 2),
            "data_batch_3: no CIFAR batch of 'data' and 'labels'",
        ),
        "no labels": (pickle.dumps({"data": rows}, 2), "data_batch_3: no CIFAR batch"),
        "other size": (
            python3_batch(rows[:, :3000], labels, "labels"),
            r"data_batch_3: data .*3000",
        ),
        "floats": (
            python3_batch(rows / 255, labels, "labels"),
            "data_batch_3: .* f8, not of integers",
        ),
        "few labels": (
            python3_batch(rows, labels[1:], "labels"),
            "data_batch_3: 7 images, but labels",
        ),
    }
    for content, message in faults.values():
        folder = write_folder(tmp_path / "cifar-10-batches-py", files)
        if content is None:
            (folder / "data_batch_3").unlink()
        else:
            (folder / "data_batch_3").write_bytes(content)
        with pytest.raises(DataError, match=message):
            cifar.read_cifar(folder, 10)


def test_a_truncated_binary_batch_and_a_strange_archive_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "bin", {"train.bin": bytes(3074 * 2 - 1), "test.bin": b""})
    with pytest.raises(DataError, match=r"train\.bin: truncated, 6147 bytes"):
        cifar.read_cifar(folder, 100)
    (folder / "train.bin").write_bytes(bytes(3074))
    with pytest.raises(DataError, match=r"test\.bin: truncated, 0 bytes"):
        cifar.read_cifar(folder, 100)
    page = tmp_path / "cifar-100-python.tar.gz"
    page.write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match="cifar-100-python.tar.gz: cannot be read"):
        cifar.read_cifar(page, 100)
    with pytest.raises(DataError, match="train is missing .found: nothing of CIFAR"):
        cifar.read_cifar(write_tar(page, {"readme": b""}), 100)


def test_archives_are_read_by_name_and_leave_nothing_on_the_disk(tmp_path: Path) -> None:
    files = cifar10_files()
    place = write_tar(tmp_path / "cifar-10-python.tar.gz", files, "../../escaped/")
    with tarfile.open(place, "w:gz") as archive:
        link = tarfile.TarInfo("data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with pytest.raises(DataError, match="data_batch_1 is missing"):
        cifar.read_cifar(place, 10)
    cifar.read_cifar(write_tar(place, files, "../../escaped/"), 10)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [place.name]
    assert not (tmp_path.parents[1] / "escaped").exists()


class Hostile:
    """Pickles as a call of `function`, which no reader may make."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


CALLED: list[str] = []


def call(*arguments: object) -> dict[str, object]:
    CALLED.append("called")
    return {}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("labels_as", [list, np.asarray, lambda labels: np.asarray(labels, ">i4")])
def test_batches_that_were_saved_again_are_read(
    tmp_path: Path, protocol: int, labels_as: Callable[[list[int]], Any]
) -> None:
    rows, labels = batch(5, 100)
    numpys = [np.int64(label) for label in labels] if labels_as is list else labels_as(labels)
    for data, fine in ((b"data", b"fine_labels"), ("data", "fine_labels")):
        content = pickle.dumps({data: rows, fine: numpys}, protocol)
        folder = write_folder(tmp_path, {"train": content, "test": content})
        images, found, *_ = cifar.read_cifar(folder, 100).arrays
        assert np.array_equal(images, as_images(rows)) and found.tolist() == labels


def test_a_number_that_stands_for_bytes_takes_no_memory(tmp_path: Path) -> None:
    content = pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [0]}, 2)
    pixels = pickle.dumps(bytes(3072).decode("latin1"), 2)[2:-3]  # as the pickle has them
    assert pixels in content
    huge = content.replace(pixels, b"\x8a\x04" + (2**28).to_bytes(4, "little"))
    write_folder(tmp_path, {"train": huge, "test": huge})
    assert refused_peak(tmp_path, "cannot be read .refused: its pickle has int for") < 10_000_000


def refused_peak(folder: Path, message: str) -> int:
    """Return the bytes that are taken at most until the batches in a folder are refused."""
    tracemalloc.start()
    with pytest.raises(DataError, match=f"train: {message}"):
        cifar.read_cifar(folder, 100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def build_on_a_class() -> bytes:
    """Return a pickle that tries to change the class the reader hands out."""
    return b"cnumpy\nndarray\n}U\x0cloaded_stateK\x01sb."


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_hostile_pickle_is_refused_and_not_run(tmp_path: Path, protocol: int) -> None:
    rows, _ = batch(2)
    for function in (call, eval, exec, __import__, np.load, getattr, print):
        content = pickle.dumps({"data": rows, "labels": Hostile(function, "CALLED")}, protocol)
        folder = write_folder(tmp_path, {"train": content, "test": content})
        with pytest.raises(DataError, match="refused: its pickle asks for|cannot be read"):
            cifar.read_cifar(folder, 100)
    with pytest.raises(DataError, match="refused: its pickle asks for .*call"):
        content = pickle.dumps(Hostile(call), protocol)
        cifar.read_cifar(write_folder(tmp_path, {"train": content}), 100)
    assert not CALLED
    assert pickle.loads(content) == {} and CALLED.pop()  # the plain reader does run it


@pytest.mark.parametrize(
    "content",
    [
        build_on_a_class(),
        b"\x80\x02cnumpy\nndarray\n)\x81}b.",
        b"(ios\nsystem\n.",
        b"(cos\nsystem\no.",
        b"\x82\x01.",
        b"Ptoken\n.",
        b"}r\xff\xff\xff\xff.",  # a memo index of 2**32 - 1
        b"\x96" + (2**62).to_bytes(8, "little") + b".",
        b"]" * 50_000 + b"a" * 49_999 + b".",
    ],
)
def test_odd_opcodes_are_refused(tmp_path: Path, content: bytes) -> None:
    before = dict(vars(cifar._Recorded))
    with pytest.raises(DataError):
        cifar.read_cifar(write_folder(tmp_path, {"train": content, "test": content}), 100)
    assert dict(vars(cifar._Recorded)) == before


def test_a_damaged_memo_index_does_not_fill_the_memory(tmp_path: Path) -> None:
    content = b"}r" + (2**26).to_bytes(4, "little") + b"."
    write_folder(tmp_path, {"train": content, "test": content})
    # Pickle's own reader takes 16 bytes for each index below this one.
    assert refused_peak(tmp_path, "no CIFAR batch") < 10_000_000


@pytest.mark.parametrize("write", [python2_batch, python3_batch])
def test_no_damage_to_a_pickle_gives_anything_but_an_error(
    tmp_path: Path, write: Callable[..., bytes]
) -> None:
    content = write(*batch(1, 100), "fine_labels")
    write_folder(tmp_path, {"test": content})
    structure = content[:150] + content[-150:]  # the rest is pixels
    refused = 0
    for damaged in mutated(structure, 2 * MUTATIONS):
        middle = len(damaged) // 2
        write_folder(tmp_path, {"train": damaged[:middle] + content[150:-150] + damaged[middle:]})
        refused += refused_or_valid(lambda: cifar.read_cifar(tmp_path, 100))
    assert refused > MUTATIONS


def test_no_damage_to_an_archive_gives_anything_but_an_error(tmp_path: Path) -> None:
    content = python2_batch(*batch(1, 100), "fine_labels")
    packed = write_tar(tmp_path / "whole", {"train": content, "test": content}).read_bytes()
    plain = gzip.decompress(packed)
    refused = 0
    for damaged in (*mutated(packed, 150), *mutated(plain, 150, reach=1024)):
        (tmp_path / "cifar.tar.gz").write_bytes(damaged)
        refused += refused_or_valid(lambda: cifar.read_cifar(tmp_path / "cifar.tar.gz", 100))
    assert refused > 150


# .npz


def npz_arrays() -> dict[str, np.ndarray]:
    labels = np.arange(6) % 3
    images = RANDOM.integers(0, 256, (6, 4, 4, 3), np.uint8)
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz_is_read(tmp_path: Path, write: Callable[..., None]) -> None:
    arrays = npz_arrays()
    write(tmp_path / "set.npz", **arrays)
    source = formats.read_npz(tmp_path / "set.npz")
    assert all(map(np.array_equal, source.arrays, arrays.values())) and source.class_names is None


def test_npz_faults_are_named(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, x_train=np.zeros(1), images=np.zeros(1))
    with pytest.raises(
        DataError, match=r"no array y_train, x_test, y_test \(found: x_train, images"
    ):
        formats.read_npz(path)
    np.savez(path, **(npz_arrays() | {"y_test": np.array([Hostile(call)])}))
    with pytest.raises(DataError, match="allow_pickle=False"):
        formats.read_npz(path)
    assert not CALLED
    path.write_bytes(b"")
    with pytest.raises(DataError, match="set.npz: cannot be read"):
        formats.read_npz(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(DataError, match="set.npz: cannot be read"):
        formats.read_npz(path)


def test_no_damage_to_an_npz_gives_anything_but_an_error(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, **npz_arrays())
    content = path.read_bytes()
    refused = 0
    for damaged in mutated(content):
        path.write_bytes(damaged)
        refused += refused_or_valid(lambda: formats.read_npz(path))
    assert refused > MUTATIONS // 2


def test_no_damage_to_an_npy_header_gives_anything_but_an_error(tmp_path: Path) -> None:
    # Repacked, so that zip's own checksum does not catch the damage first.
    arrays = npz_arrays()
    npy = io.BytesIO()
    np.save(npy, arrays["y_train"])
    np.savez(tmp_path / "rest.npz", **{key: arrays[key] for key in ("x_train", "x_test", "y_test")})
    rest = (tmp_path / "rest.npz").read_bytes()
    refused = 0
    for damaged in mutated(npy.getvalue(), reach=128):
        (tmp_path / "set.npz").write_bytes(rest)
        with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
            archive.writestr("y_train.npy", damaged)
        refused += refused_or_valid(lambda: formats.read_npz(tmp_path / "set.npz"))
    assert refused > MUTATIONS // 2

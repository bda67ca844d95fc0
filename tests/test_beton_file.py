"""Reading .beton files without FFCV: every kind of image, and whatever damage a file may have."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reat_fast.sources import beton_file
from reat_fast.sources.beton_file import BetonError, read_beton

Bytes = npt.NDArray[np.uint8]
PAGE = 1 << 12  # smaller than FFCV writes, so that small files have several
KINDS = ("raw", "jpg", "smart", "grey", "plane")


def made_beton(path: Path, kind: str, count: int = 6, page: int = PAGE, **fields: int) -> Path:
    """Write a file as FFCV does: an image field, an integer field, and `fields` by their number."""
    images, labels = made_images(kind, count), np.arange(count) % 3
    contents = [_content(kind, at, image) for at, image in enumerate(images)]
    types = {"image": 2 if images.shape[3] == 3 else 4, "label": 1, **fields}
    records_type = [beton_file._RECORDS[number] for number in types.values()]
    records = np.zeros(count, np.dtype([("", kind) for kind in records_type], align=True))
    start = 24 + 1041 * len(types) + records.nbytes
    place = -(-start // page) * page
    places = []
    for at, content in enumerate(contents):
        if place % page + len(content) > page:
            place = -(-place // page) * page
        places.append((at, place, len(content)))
        if images.shape[3] == 3:
            jpeg = content[:2] == b"\xff\xd8"
            records["f0"][at] = (0 if jpeg else 1, images.shape[2], images.shape[1], place)
        else:
            records["f0"][at] = place
        place += len(content)
    records["f1"] = labels
    header = np.array([(2, len(types), page, count, place)], beton_file._HEADER)
    whole = bytearray(place)
    tables = [header, *(_field(name, number, kind) for name, number in types.items()), records]
    head = b"".join(table.tobytes() for table in tables)
    whole[: len(head)] = head
    for (_, start, size), content in zip(places, contents, strict=True):
        whole[start : start + size] = content
    path.write_bytes(bytes(whole) + np.array(places, "<u8").tobytes())
    return path


def made_images(kind: str, count: int) -> Bytes:
    """Make images [count, 8, 10, C] of a slope each, which JPEG keeps nearly as it is."""
    slope = np.arange(80, dtype=np.uint8).reshape(1, 8, 10, 1)
    channels = 1 if kind in ("grey", "plane") else 3
    return np.repeat(
        slope + 20 * np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), channels, 3
    )


def _content(kind: str, at: int, image: Bytes) -> bytes:
    if kind not in ("jpg", "smart") or (kind == "smart" and at % 2):
        return image.tobytes()
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "JPEG", quality=95, subsampling=0)
    return encoded.getvalue()


def _field(name: str, number: int, kind: str) -> npt.NDArray[Any]:
    arguments = np.zeros(1024, np.uint8)
    if number == 4:
        shape = (8, 10, 1) if kind == "grey" else (8, 10)
        dtype = b'[["", "|u1"]]'
        sizes = np.zeros(33, "<u8")
        sizes[: len(shape)], sizes[32] = shape, len(dtype)
        arguments[: 264 + len(dtype)] = np.frombuffer(sizes.tobytes() + dtype, np.uint8)
    letters = np.frombuffer(name.encode().ljust(16, b"\0"), np.uint8)
    return np.array([(number, letters, arguments)], beton_file._FIELD)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_labels_come_back(tmp_path: Path, kind: str) -> None:
    beton = read_beton(made_beton(tmp_path / "set.beton", kind))
    expected = made_images(kind, 6)
    assert beton.images.shape == expected.shape and beton.labels.tolist() == [0, 1, 2, 0, 1, 2]
    # A slope of 1 per pixel at quality 95 is off by the rounding of colour and cosine transform.
    off = 3 if kind in ("jpg", "smart") else 0
    assert np.abs(beton.images[:].astype(int) - expected).max() <= off
    assert np.array_equal(beton.images[np.array([4, 1])], beton.images[:][[4, 1]])


def test_a_selection_of_a_selection_keeps_its_place_in_the_file(tmp_path: Path) -> None:
    images = read_beton(made_beton(tmp_path / "set.beton", "raw")).images
    chosen = images.take(np.array([5, 3, 3, 0])).take(np.array([3, 1]))
    assert chosen.rows.tolist() == [0, 3]
    assert np.array_equal(chosen[:], images[[0, 3]])
    copied = pickle.loads(pickle.dumps(chosen))  # as to a worker process
    assert np.array_equal(copied[:], chosen[:])


def test_other_fields_are_passed_over(tmp_path: Path) -> None:
    others = {"score": 0, "identity": 1, "text": 3, "note": 5}
    beton = read_beton(made_beton(tmp_path / "set.beton", "raw", **others))
    assert np.array_equal(beton.images[:], made_images("raw", 6))
    assert beton.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert beton.fields == ("image", "label", *others) and beton.image_field == "image"


def changed(at: int, value: bytes) -> Callable[[bytes], bytes]:
    """Return a damage: `value` written over the bytes from `at`, from the end where negative."""

    def change(content: bytes) -> bytes:
        start = at % len(content)
        return content[:start] + value + content[start + len(value) :]

    return change


def number(value: int, size: int = 8) -> bytes:
    return value.to_bytes(size, "little")


FIELDS = 24
RECORDS = FIELDS + 2 * 1041
RECORD = 24  # mode 1, width 2, height 2, pointer 8, and the label aligned to 8 bytes


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda content: b"", "shorter than its header", id="empty"),
        pytest.param(lambda content: content[:23], "shorter than its header", id="half a header"),
        pytest.param(lambda content: content[:3000], "not whole|shorter", id="pixels cut off"),
        pytest.param(lambda content: content[:-1], "not whole", id="table cut off"),
        pytest.param(lambda content: b"PK\3\4" + content[4:], "version 2", id="a zip"),
        pytest.param(changed(2, number(0, 2)), "no fields", id="no fields"),
        pytest.param(changed(2, number(65535, 2)), "shorter than", id="many fields"),
        pytest.param(changed(4, number(3000, 4)), "power of two", id="odd pages"),
        pytest.param(changed(4, number(256, 4)), "two pages", id="pages smaller than images"),
        pytest.param(changed(8, number(0)), "no images", id="no images"),
        pytest.param(changed(8, number(2**63)), "shorter than", id="many images"),
        pytest.param(changed(16, number(0)), "interrupted", id="writer interrupted"),
        pytest.param(changed(16, number(2**64 - 1)), "not whole", id="table beyond the end"),
        pytest.param(changed(FIELDS, b"\xff"), "FFCV alone", id="a field of one's own"),
        pytest.param(changed(FIELDS, b"\0"), "no field that may be the image", id="no image field"),
        pytest.param(changed(FIELDS + 1041, b"\0"), "the label", id="no label field"),
        pytest.param(changed(FIELDS + 1, b"\xe4"), "ASCII", id="odd name"),
        pytest.param(changed(RECORDS, b"\2"), "neither raw nor JPEG", id="unknown mode"),
        pytest.param(
            changed(RECORDS + RECORD + 1, number(9, 2)), "different sizes", id="another width"
        ),
        pytest.param(changed(RECORDS + 5, number(2**63)), "not where it says", id="lost pixels"),
        pytest.param(changed(-8, number(239)), "bytes of its size", id="an image too short"),
        pytest.param(changed(-8, number(2**64 - 1)), "outside", id="an image too long"),
        pytest.param(changed(-16, number(0)), "outside", id="pixels in the header"),
        pytest.param(
            lambda content: content[:-16] + content[-40:-32] + content[-8:],
            "two things in one place",
            id="one place for two",
        ),
    ],
)
def test_damage_is_told_in_one_line(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = made_beton(tmp_path / "set.beton", "raw")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BetonError, match=message) as raised:
        read_beton(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_arrays_of_other_kinds_are_refused(tmp_path: Path) -> None:
    path = made_beton(tmp_path / "set.beton", "grey")
    content = path.read_bytes()
    arguments = FIELDS + 17
    for damage, message in (
        (changed(arguments, number(0)), "arrays of shape"),
        (changed(arguments + 16, number(2)), "arrays of shape"),
        (changed(arguments + 24, number(5)), "arrays of shape"),
        (changed(arguments, number(2**62)), "bytes of its size"),
        (changed(arguments + 264, b'[["", "<f4"]]'), "not of uint8"),
        (changed(arguments + 256, number(2**64 - 1)), "not of uint8"),
    ):
        path.write_bytes(damage(content))
        with pytest.raises(BetonError, match=message):
            read_beton(path)


def test_a_second_field_of_the_kind_is_refused_unless_one_has_the_name(tmp_path: Path) -> None:
    path = made_beton(tmp_path / "set.beton", "raw", identity=1)
    assert read_beton(path).labels.max() == 2
    path.write_bytes(path.read_bytes().replace(b"label\0", b"class\0", 1))
    with pytest.raises(BetonError, match="more than one .* label .*image, class, identity"):
        read_beton(path)


def test_what_is_no_file_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BetonError, match="not found"):
        read_beton(tmp_path / "none.beton")
    with pytest.raises(BetonError, match="cannot be read"):
        read_beton(tmp_path)


def test_a_file_that_shrinks_while_it_is_used_does_not_kill_the_process(tmp_path: Path) -> None:
    path = made_beton(tmp_path / "set.beton", "raw")
    images = read_beton(path).images
    path.write_bytes(path.read_bytes()[: PAGE + 300])  # the tables, and one image
    with pytest.raises(BetonError, match="ends before image"):
        images[:]


def test_a_damaged_jpeg_is_named(tmp_path: Path) -> None:
    path = made_beton(tmp_path / "set.beton", "jpg")
    beton = read_beton(path)
    at = int(beton.images._places["at"][2])
    content = path.read_bytes()
    path.write_bytes(content[:at] + bytes(20) + content[at + 20 :])
    assert beton.images[np.array([0, 1, 3])].shape == (3, 8, 10, 3)
    with pytest.raises(BetonError, match="image 2 is damaged"):
        beton.images[:]


def test_a_jpeg_of_another_size_than_announced_is_refused(tmp_path: Path) -> None:
    path = made_beton(tmp_path / "set.beton", "jpg", count=1)
    path.write_bytes(changed(RECORDS + 1, number(60000, 2) * 2)(path.read_bytes()))
    with pytest.raises(BetonError, match="is 10x8, not 60000x60000|cannot be read"):
        read_beton(path).images[:]


@pytest.mark.parametrize("kind", KINDS)
def test_no_beginning_of_a_file_passes_for_a_file(tmp_path: Path, kind: str) -> None:
    path = made_beton(tmp_path / "set.beton", kind, count=2)
    content = path.read_bytes()
    for size in (
        *range(0, 100),
        *range(100, len(content), 97),
        *range(len(content) - 50, len(content)),
    ):
        path.write_bytes(content[:size])
        with pytest.raises(BetonError):
            read_beton(path)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    changes=st.lists(
        st.tuples(st.integers(0, 2**32), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4
    ),
    in_tables=st.booleans(),
)
def test_random_damage_gives_images_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    changes: list[tuple[int, bytes]],
    in_tables: bool,
) -> None:
    path = made_beton(tmp_path_factory.getbasetemp() / f"{kind}.beton", kind)
    content = path.read_bytes()
    tables = [*range(FIELDS + 20), *range(FIELDS + 1041, RECORDS + 6 * RECORD), *range(-144, 0)]
    for at, value in changes:
        where = tables[at % len(tables)] if in_tables else at % len(content)
        content = changed(where, value)(content)[: len(content)]
    path.write_bytes(content)
    try:
        beton = read_beton(path)
        assert beton.images[:].shape == (len(beton.labels), *beton.images.shape[1:])
    except BetonError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("kind", ["raw", "jpg", "smart", "grey"])
def test_files_that_ffcv_writes_are_read(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("ffcv", reason="needs FFCV: scripts/ffcv.sh")
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    images, labels = made_images(kind, 5), [2, 0, 1, 0, 2]
    image_field = (
        NDArrayField(np.dtype(np.uint8), (8, 10, 1))
        if kind == "grey"
        else RGBImageField(kind, smart_threshold=100, jpeg_quality=95)
    )
    path = tmp_path / "set.beton"
    fields = {"image": image_field, "label": IntField()}
    writer = DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1)
    writer.from_indexed_dataset(list(zip(images, labels, strict=True)))
    beton = read_beton(path)
    assert beton.labels.tolist() == labels
    # FFCV's JPEG halves the resolution of colours, which a grey slope does not show.
    off = 3 if kind in ("jpg", "smart") else 0
    assert np.abs(beton.images[:].astype(int) - images).max() <= off

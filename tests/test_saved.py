"""evaluation.json gathers attacks of the same conditions and gives nothing up for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from reat_fast.data import ImageSet
from reat_fast.evaluation import saved
from reat_fast.evaluation.figures import parts
from reat_fast.evaluation.guards import UNKNOWN_COUNTS
from reat_fast.evaluation.saved import (
    CONDITIONS,
    exported_of_other_images,
    images_sha256,
    joined,
    known_epoch,
    weights_sha256,
    write_at_the_end,
    write_beside_others,
)
from reat_fast.sources.lazy import FileImages, LazyImages


def result(attacks: dict[str, float], **changes: Any) -> dict[str, Any]:
    same = {name: name for name in CONDITIONS}
    figures = {name: {"overall": value} for name, value in attacks.items()}
    return {**same, "attacks": figures, "seconds": 2.5, "warnings": ["w"], **changes}


def content(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text()))


def test_attacks_of_the_same_conditions_are_gathered(tmp_path: Path) -> None:
    file, _ = write_beside_others(
        tmp_path, result({"clean": 70.0, "aa": 30.0}, weights_epoch=7, device="one")
    )
    later = result({"clean": 71.0, "cw20": 40.0}, device="another")
    again, whole = write_beside_others(tmp_path, later)
    assert again == file == tmp_path / "evaluation.json"
    assert whole == content(file)
    overall = {name: figures["overall"] for name, figures in whole["attacks"].items()}
    assert overall == {"clean": 71.0, "aa": 30.0, "cw20": 40.0}
    assert whole["device"] == "another"
    assert known_epoch(tmp_path, "weights_sha256") == 7
    assert known_epoch(tmp_path, "of other weights") is None
    assert whole["weights_epoch"] == 7 and whole["seconds"] == 5.0 and whole["warnings"] == ["w"]


# By hand: a condition that is forgotten there would be forgotten here.
SEPARATE = ["weights", "weights_sha256", "dataset", "samples", "images_sha256"]
SEPARATE += ["eps", "step_size", "l2_eps", "restarts", "precision", "seed"]


@pytest.mark.parametrize("condition", SEPARATE)
def test_another_condition_gets_a_file_of_its_own_and_finds_it_again(
    condition: str, tmp_path: Path
) -> None:
    first, _ = write_beside_others(tmp_path, result({"aa": 30.0}))
    before = first.read_bytes()
    for name in ("clean", "pgd20"):
        other, _ = write_beside_others(tmp_path, result({name: 1.0}, **{condition: "other"}))
        assert other == tmp_path / "evaluation-2.json"
    assert first.read_bytes() == before
    assert set(content(other)["attacks"]) == {"clean", "pgd20"}


def test_an_evaluation_of_weights_that_were_trained_since_makes_room(tmp_path: Path) -> None:
    weights = tmp_path / "best.safetensors"
    for trained, attack in ((b"first", "aa"), (b"second", "clean"), (b"second", "fgsm")):
        weights.write_bytes(trained)
        known = {"weights": weights.name, "weights_sha256": weights_sha256(weights)}
        file, _ = write_beside_others(tmp_path, result({attack: 30.0}, **known))
        assert file.name == "evaluation.json"
    assert set(content(file)["attacks"]) == {"clean", "fgsm"}
    assert set(content(tmp_path / "evaluation-2.json")["attacks"]) == {"aa"}


def test_the_test_at_the_end_of_a_run_sets_other_evaluations_aside(tmp_path: Path) -> None:
    write_beside_others(tmp_path, result({"aa": 30.0}, samples=20))
    write_beside_others(tmp_path, result({"aa": 31.0}, samples=5))
    own = result({"clean": 70.0})
    assert write_at_the_end(tmp_path, own) == own == content(tmp_path / "evaluation.json")
    found = {number: content(tmp_path / f"evaluation-{number}.json") for number in (2, 3)}
    assert {number: told["samples"] for number, told in found.items()} == {2: 5, 3: 20}
    assert all("aa" in told["attacks"] for told in found.values())
    assert set(write_at_the_end(tmp_path, result({"pgd20": 1.0}))["attacks"]) == {"clean", "pgd20"}
    (tmp_path / "evaluation.json").write_text("torn")
    write_at_the_end(tmp_path, own)
    assert (tmp_path / "evaluation-4.json").read_text() == "torn"


def test_nothing_is_lost_where_the_test_at_the_end_is_killed_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_beside_others(tmp_path, result({"aa": 30.0}, samples=20))
    monkeypatch.setattr(saved, "write", lambda *_: None)
    write_at_the_end(tmp_path, result({"clean": 70.0}))
    assert not (tmp_path / "evaluation.json").exists()
    assert set(content(tmp_path / "evaluation-2.json")["attacks"]) == {"aa"}


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"attacks": 3}', "[" * 100_000])
def test_what_cannot_be_read_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    assert joined(tmp_path / "evaluation.json", result({"clean": 1.0})) is None
    file, _ = write_beside_others(tmp_path, result({"clean": 1.0}))
    assert file.name == "evaluation-2.json"
    assert (tmp_path / "evaluation.json").read_text() == text


def test_test_sets_are_known_by_labels_and_images(tmp_path: Path) -> None:
    labels = np.arange(100, dtype=np.int64) % 4
    images = np.arange(1200, dtype=np.uint8).reshape(100, 2, 2, 3)
    known = images_sha256(ImageSet(images, labels))
    assert known == images_sha256(ImageSet(images.copy(order="F"), labels))
    assert known != images_sha256(ImageSet(images, labels[::-1].copy()))
    assert known != images_sha256(ImageSet(images.reshape(100, 1, 4, 3), labels))
    images[50, 0, 0, 0] ^= 1
    assert known != images_sha256(ImageSet(images, labels))
    images[50, 0, 0, 0] ^= 1

    class Decoded(LazyImages):
        def read(self, indices: Any) -> Any:
            assert len(indices) <= 64
            return images[indices]

    lazy = images_sha256(ImageSet(Decoded(images.shape), labels))
    images ^= 1
    assert lazy != images_sha256(ImageSet(Decoded(images.shape), labels))


def test_image_files_are_known_by_names_and_sizes_and_not_decoded(tmp_path: Path) -> None:
    def known(place: str, name: str, content: bytes, size: int = 8) -> str:
        (tmp_path / place).mkdir(exist_ok=True)
        file = tmp_path / place / name
        file.write_bytes(content)
        return images_sha256(ImageSet(FileImages([file], size), np.zeros(1, np.int64)))

    first = known("here", "a.png", b"123")
    assert first == known("there", "a.png", b"123")
    others = [("b.png", b"123"), ("a.png", b"1234"), ("a.png", b"123", 9)]
    assert first not in [known("here", *other) for other in others]


def test_weights_are_known_by_their_bytes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"abc")
    assert weights_sha256(file).startswith("ba7816bf8f01cfea414140de5dae2223")  # of FIPS 180-2


def test_gathered_attacks_have_head_body_and_tail_by_the_same_classes(tmp_path: Path) -> None:
    """Which are known where either evaluation knew the training images of each class."""
    per_class = [10.0, 20.0, 60.0, 90.0]
    unknown, counts = {**parts(per_class), "per_class": per_class}, [5, 10, 20, 40]
    known = {**parts(per_class, counts), "per_class": per_class}
    assert unknown["tail"] != known["tail"] and known["tail80"] is not None
    first = result({}) | {"attacks": {"pgd20": unknown}, "warnings": ["w", UNKNOWN_COUNTS]}
    later = result({}) | {"attacks": {"clean": known}, "train_counts": counts}
    for name, pair in (("a", (first, later)), ("b", (later, first))):
        (tmp_path / name).mkdir()
        for found in pair:
            _, whole = write_beside_others(tmp_path / name, found)
        assert whole["attacks"] == {"pgd20": known, "clean": known}
        assert whole["train_counts"] == counts and whole["warnings"] == ["w"]


@pytest.mark.parametrize(
    ("evaluation", "others"),
    [
        ({"samples": 10, "images_sha256": "a"}, False),
        ({"samples": 10, "images_sha256": "b"}, True),
        ({"samples": 9, "images_sha256": "b"}, False),
        ({"samples": 10}, False),  # of an older version, which did not say
        (None, False),
    ],
)
def test_an_export_knows_the_images_of_its_figures(
    evaluation: object, others: bool, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"evaluation": evaluation}))
    assert exported_of_other_images(tmp_path, "a", 10) == others

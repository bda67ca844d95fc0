"""What tells the training images of a run from others, in its folder and in data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import made_npz
from PIL import Image

from reat_fast.checkpoint import CHECKPOINT
from reat_fast.config import Config
from reat_fast.data import load_dataset
from reat_fast.evaluation import trained_on
from reat_fast.evaluation.trained_on import (
    agree,
    digest_of_files,
    digest_of_images,
    digests_of_data,
    digests_of_run,
    draw_splits,
    was_trained_on,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    data = made_npz(tmp_path / "made.npz")
    return Config(dataset="npz", data=data, imbalance=0.5, held_out=0.0)


def test_a_folder_tells_what_its_split_or_else_its_checkpoint_holds(tmp_path: Path) -> None:
    assert digests_of_run(tmp_path) == {}
    torch.save({"fingerprint": "f", "images": "i"}, tmp_path / CHECKPOINT)
    assert digests_of_run(tmp_path) == {"fingerprint": "f", "images_sha256": "i"}
    split = tmp_path / "split.json"
    for content in ("[1]", "{", json.dumps({"fingerprint": "f"})):
        split.write_text(content)
        assert digests_of_run(tmp_path) == {"fingerprint": "f", "images_sha256": "i"}
    split.write_text(json.dumps({"fingerprint": "s", "images_sha256": None}))  # of lazy images
    assert digests_of_run(tmp_path) == {"fingerprint": "s"}
    (tmp_path / CHECKPOINT).write_bytes(b"PK")
    split.unlink()
    assert digests_of_run(tmp_path) == {}


def test_descriptions_agree_as_far_as_both_tell() -> None:
    assert agree({}, {"a": 1}) and agree({"a": 1, "b": 2}, {"a": 1, "c": 3})
    assert not agree({"a": 1, "b": 2}, {"a": 1, "b": 3})


def test_the_digests_of_data_are_those_of_the_split_that_is_drawn(config: Config) -> None:
    assert config.data is not None
    splits = draw_splits(config, load_dataset("npz", config.data))
    told = {
        "fingerprint": splits.fingerprint,
        "images_sha256": digest_of_images(splits),
        "class_names": [*"0123"],
    }
    assert digests_of_data(config, config.data) == told
    assert not agree(digests_of_data(replace(config, split_seed=1), config.data), told)
    assert not agree(digests_of_data(replace(config, largest=9999), config.data), told)


def test_data_is_read_once_and_a_large_folder_under_its_own_path_never(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.data is not None
    run, read = tmp_path / "run", []
    run.mkdir()
    told = digests_of_data(config, config.data)
    (run / "split.json").write_text(json.dumps({**told}))
    monkeypatch.setattr(
        trained_on, "digests_of_data", lambda _, place: read.append(place) or digests[place]
    )
    images, known = tmp_path / "images", {}
    images.mkdir()
    digests = {config.data: told, images: {"fingerprint": "other"}}
    for _ in range(2):
        assert was_trained_on(run, config, config.data, known)
        assert not was_trained_on(run, config, images, known)
    assert read == [config.data, images]
    assert was_trained_on(run, replace(config, data=images), images, {})
    assert read == [config.data, images]


def test_image_files_are_told_apart_by_their_classes_names_and_sizes(tmp_path: Path) -> None:
    """Without decoding them; a checkpoint keeps no digest of theirs."""
    config = Config(dataset="folder", image_size=8, imbalance=1.0, held_out=0.0)
    for place, names, shade in (("a", "xy", 0), ("b", "xz", 0), ("c", "xy", 255)):
        for part in ("train", "test"):
            for name in names:
                (tmp_path / place / part / name).mkdir(parents=True)
                for k in range(4):
                    noise = np.random.RandomState(k).randint(0, 1 + shade, (8, 8, 3))
                    image = Image.fromarray(noise.astype(np.uint8))
                    image.save(tmp_path / place / part / name / f"{k}.png")
    first, second, third = (digests_of_data(config, tmp_path / place) for place in "abc")
    assert first["fingerprint"] == second["fingerprint"] == third["fingerprint"]
    assert first["class_names"] == third["class_names"] != second["class_names"]
    assert first["images_sha256"] != third["images_sha256"]
    assert not agree(first, second) and not agree(first, third)
    splits = draw_splits(config, load_dataset("folder", tmp_path / "a", image_size=8))
    assert digest_of_images(splits) == "" and digest_of_files(splits) == first["images_sha256"]
    (tmp_path / "a").rename(tmp_path / "moved")
    assert digests_of_data(config, tmp_path / "moved") == first

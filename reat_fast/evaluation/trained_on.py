"""The images that a run is trained on: how they are drawn, and what tells them from others.

Runs on other images can have equal settings, for a path says nothing of what lies there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from reat_fast.checkpoint import glance
from reat_fast.config import Config
from reat_fast.data import DataError, Dataset, Splits, load_run_data, make_splits
from reat_fast.evaluation.saved import images_sha256
from reat_fast.sources.lazy import FileImages
from reat_fast.storage.json_object import read_object

SPLIT_FIELDS = (
    *("dataset", "image_size", "imbalance", "imbalance_profile", "largest", "held_out"),
    "split_seed",
)
"""Settings that, with the data itself, say which images a run is trained on."""


def draw_splits(config: Config, dataset: Dataset) -> Splits:
    """Draw the long-tailed split of a run from its data set. Errors: DataError."""
    return make_splits(
        dataset,
        imbalance=config.imbalance,
        profile=config.imbalance_profile,
        largest=config.largest,
        held_out=config.held_out,
        seed=config.split_seed,
    )


def digest_of_images(splits: Splits) -> str:
    """Return the digest of the training images that a checkpoint keeps, "" for lazy ones.

    Decoding those may differ by version.
    """
    in_memory = isinstance(splits.train.images, np.ndarray)
    return images_sha256(splits.train) if in_memory else ""


def digest_of_files(splits: Splits) -> str:
    """Return digest_of_images, and of image files that of their names and sizes."""
    are_files = isinstance(splits.train.images, FileImages)
    return images_sha256(splits.train) if are_files else digest_of_images(splits)


def was_trained_on(
    folder: Path, config: Config, place: Path, known: dict[tuple[object, ...], dict[str, Any]]
) -> bool:
    """Say whether the run in a folder was begun on what the data at `place` has now.

    config: that of the run. known: digests of data, each of which is read once; what is read is
    added. The path decides where the folder tells no digest, and for a folder of images under the
    path that the run had, which may take long to read. Errors: DataError.
    """
    same_path = config.data is not None and config.data.resolve() == place.resolve()
    there = digests_of_run(folder)
    if not there:
        return same_path or config.data is None
    if same_path and place.is_dir():
        return True
    data = (place.resolve(), *(getattr(config, name) for name in SPLIT_FIELDS))
    if data not in known:
        known[data] = digests_of_data(config, place)
    return agree(there, known[data])


def digests_of_data(config: Config, place: Path) -> dict[str, Any]:
    """Return the digests of what a run would be trained on with the data at `place`.

    Data that gives no such split has a fingerprint that no run has. Errors: DataError for what
    cannot be read.
    """
    dataset = load_run_data(config, path=place, image_size=config.image_size)
    try:
        splits = draw_splits(config, dataset)
    except DataError:
        return {"fingerprint": "none"}
    return _known(
        {
            "fingerprint": splits.fingerprint,
            "images_sha256": digest_of_files(splits),
            "class_names": list(dataset.class_names),
        }
    )


def digests_of_run(folder: Path) -> dict[str, Any]:
    """Return the digests that a run folder tells of its training images, {} where it tells none."""
    try:
        split = read_object(folder / "split.json")
    except (OSError, ValueError):
        split = {}
    if "images_sha256" not in split:  # older runs have it in their checkpoint alone
        state = glance(folder)
        kept = {"fingerprint": state.get("fingerprint"), "images_sha256": state.get("images")}
        split = {**kept, **split}
    return _known(split)


def _known(told: Mapping[str, Any]) -> dict[str, Any]:
    kinds = {"fingerprint": str, "images_sha256": str, "class_names": list}
    named = {name: told.get(name) for name in kinds}
    return {name: one for name, one in named.items() if one and isinstance(one, kinds[name])}


def agree(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Say whether two descriptions of training images are of the same, as far as both tell."""
    return all(others.get(name, value) == value for name, value in some.items())

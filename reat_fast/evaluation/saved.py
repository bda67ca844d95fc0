"""evaluation.json: attacks on the same weights under the same conditions, none of them lost."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from reat_fast.data import Dataset, ImageSet, spread
from reat_fast.evaluation.figures import parts, tail_by_share
from reat_fast.evaluation.guards import UNKNOWN_COUNTS
from reat_fast.sources.beton_folder import digest
from reat_fast.sources.lazy import FileImages, LazyImages
from reat_fast.storage.json_object import read_object
from reat_fast.storage.typed_fields import from_values
from reat_fast.storage.whole_files import write_text

EVALUATION = "evaluation.json"

DECODED = 64
"""Images that tell lazy sets apart."""

CONDITIONS = (
    *("weights", "weights_sha256", "dataset", "samples", "images_sha256"),
    *("eps", "step_size", "l2_eps", "restarts", "precision", "seed"),
)
"""What attacks in one file share; what a file of another version does not hold is not compared."""


@dataclass(frozen=True)
class _Numbers:
    """What an evaluation tells in numbers beside its figures, each of which a file may lack."""

    eps: float = 0.0
    step_size: float = 0.0
    l2_eps: float = 0.0
    samples: int = 0
    seed: int = 0
    weights_epoch: int = 0
    train_counts: tuple[int, ...] | None = None
    per_class_samples: tuple[int, ...] | None = None


def refuse_other_types(evaluation: Mapping[str, Any]) -> None:
    """Raise ValueError for radii, images and counts of a file that no evaluation can have."""
    known = [field.name for field in fields(_Numbers)]
    told = {name: evaluation[name] for name in known if name in evaluation}
    lists = {name: tuple(value) for name, value in told.items() if isinstance(value, list)}
    numbers = from_values(_Numbers, told | lists)
    for name in ("eps", "step_size", "l2_eps"):
        if not 0 <= getattr(numbers, name) <= 1e4:
            raise ValueError(f"{name} cannot be {getattr(numbers, name)}")


def weights_sha256(weights: Path) -> str:
    """Return the sha256 of a file of weights, by which an evaluation knows them."""
    return hashlib.sha256(weights.read_bytes()).hexdigest()


def images_sha256(image_set: ImageSet) -> str:
    """Return a sha256 of labels and images, by which an evaluation knows what it was made on.

    Of image files names and sizes stand for the pixels, of other images that would have to be
    decoded the pixels of a few: knowing a set must not cost as much as a pass over it.
    """
    images = image_set.images
    hashed = digest(images.shape, image_set.labels)
    if isinstance(images, FileImages):
        hashed.update(repr([(path.name, path.stat().st_size) for path in images.paths]).encode())
    elif isinstance(images, LazyImages):
        rows = spread(min(DECODED, len(images)), len(images))
        hashed.update(images[rows].tobytes())
    else:
        hashed.update(np.ascontiguousarray(images).data)
    return hashed.hexdigest()


def described(
    result: Mapping[str, Any],
    conditions: Mapping[str, Any],
    weights: Path,
    dataset: Dataset,
    images: str,
    train_counts: Sequence[int] | None,
    warnings: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what evaluation.json holds but the seconds: figures, and what they were measured on.

    result: what measure.evaluate returns; conditions: eps, step_size, l2_eps, restarts, precision,
    seed and device; images: the images_sha256 of the set; train_counts: None where nothing tells.
    """
    counts = {}
    if train_counts is not None:
        counts = {"train_counts": list(train_counts), "tail80_classes": tail_by_share(train_counts)}
    return {
        **result,
        **conditions,
        **counts,
        "weights": weights.name,
        "weights_sha256": weights_sha256(weights),
        "dataset": dataset.name,
        "images_sha256": images,
        "class_names": list(dataset.class_names),
        "warnings": list(warnings),
    }


def of_these_weights(evaluation: Mapping[str, Any], folder: Path) -> bool:
    """Say whether an evaluation is of weights as they are in a folder now.

    Those that are no longer there, or that the evaluation does not know by their bytes, are not
    others.
    """
    weights = folder / str(evaluation.get("weights", ""))
    known = evaluation.get("weights_sha256")
    return known is None or not weights.is_file() or known == weights_sha256(weights)


def known_epoch(folder: Path, sha256: str) -> int | None:
    """Return the epoch of the weights of this digest, where the test of a run in a folder tells."""
    tested = _read(folder / EVALUATION)
    return tested.get("weights_epoch") if tested.get("weights_sha256") == sha256 else None


def exported_of_other_images(folder: Path, images: str, samples: int) -> bool:
    """Say whether an export in a folder has figures of as many images that are others.

    It holds no path, so another copy of its set may be read where none is named.
    """
    exported = _read(folder / "config.json").get("evaluation")
    if not isinstance(exported, dict) or exported.get("samples") != samples:
        return False
    return str(exported.get("images_sha256", images)) != images


def write_beside_others(folder: Path, result: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Write what an evaluation found into a folder that may hold others; returns file and content.

    The file is the first of evaluation.json, evaluation-2.json, ... that is not there yet or is of
    the same weights and conditions, whose other attacks stay. An evaluation.json of weights that
    have been trained since is set aside before.
    """
    if not of_these_weights(_read(folder / EVALUATION), folder):
        set_aside(folder / EVALUATION)
    for file in files(folder):
        whole = joined(file, result)
        if whole is not None or not file.exists():
            break
    written = result if whole is None else whole
    write(file, written)
    return file, written


def write_at_the_end(folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the test that ends a run as evaluation.json; returns what it holds then.

    Attacks that a run was evaluated under since stay, in the same file or, where it was of other
    weights or under other conditions, in one that is set aside.
    """
    file = folder / EVALUATION
    whole = joined(file, result)
    if whole is None and file.exists():
        set_aside(file)
    written = result if whole is None else whole
    write(file, written)
    return written


def files(folder: Path) -> Iterator[Path]:
    """Name evaluation.json, evaluation-2.json, ... without end, whether they are there or not."""
    return _numbered(folder / EVALUATION)


def _numbered(file: Path) -> Iterator[Path]:
    yield file
    for number in itertools.count(2):
        yield file.with_stem(f"{file.stem}-{number}")


def set_aside(file: Path) -> Path:
    """Give an evaluation the next free name, and what is written there next takes no attack."""
    free = next(other for other in _numbered(file) if not other.exists())
    file.rename(free)
    return free


def write_as_named(file: Path, result: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
    """Write what an evaluation found into a file that the user named.

    Returns its content, and where an evaluation of other weights or under other conditions that was
    there is now.
    """
    whole, aside = joined(file, result), None
    if whole is None and "attacks" in _read(file):
        aside = set_aside(file)
    written = result if whole is None else whole
    write(file, written)
    return written, aside


def _read(file: Path) -> dict[str, Any]:
    """Read an evaluation, {} where there is none or a damaged one."""
    try:
        return read_object(file)
    except (OSError, ValueError):
        return {}


def joined(file: Path, result: dict[str, Any]) -> dict[str, Any] | None:
    """Return an earlier evaluation with the attacks of a later one, seconds added up.

    None where there is no earlier one, or one of other weights or under other conditions.
    Attacks of both have head, body and tail by the training images that either knows of.
    """
    try:
        earlier = read_object(file)
        same = all(earlier.get(name, result[name]) == result[name] for name in CONDITIONS)
        if not same or not isinstance(earlier["attacks"], dict):
            return None
        whole = {**earlier, **result}
        attacks = earlier["attacks"] | result["attacks"]
        # One of the two may not have known which classes are head, body and tail.
        counts = whole.get("train_counts")
        if counts != earlier.get("train_counts") or counts != result.get("train_counts"):
            attacks = {
                name: {**found, **parts(found["per_class"], counts)}
                for name, found in attacks.items()
            }
        warnings = [*earlier.get("warnings", ()), *result["warnings"]]
        if counts is not None:
            warnings = [warning for warning in warnings if warning != UNKNOWN_COUNTS]
        return {
            **whole,
            "attacks": attacks,
            "seconds": round(earlier["seconds"] + result["seconds"], 3),
            "warnings": list(dict.fromkeys(warnings)),
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # damaged, or not one of ours


def refuse_other(file: Path) -> None:
    """Raise ValueError where a file to write is there and holds something else."""
    empty = file.is_file() and not file.stat().st_size
    if file.exists() and not empty and "attacks" not in _read(file):
        raise ValueError(f"--out {file}: holds something else than an evaluation; name a new file")


def write(file: Path, result: dict[str, Any]) -> None:
    """Write an evaluation as JSON, whole or not at all."""
    write_text(file, json.dumps(result, indent=2) + "\n")

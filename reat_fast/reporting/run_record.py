"""What a report knows of a run: the files of its folder, read once and checked.

A folder may lack anything but config.json, for a run may still be going on. A file that is there
and cannot be read is named.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reat_fast.checkpoint import LAST, glance
from reat_fast.config import Config
from reat_fast.evaluation.attacks import threat_text
from reat_fast.evaluation.figures import largest_first
from reat_fast.evaluation.saved import EVALUATION, of_these_weights, refuse_other_types
from reat_fast.evaluation.trained_on import digests_of_run
from reat_fast.sources.longtail import by_falling_size
from reat_fast.storage.config_file import from_json
from reat_fast.storage.json_object import read_object

PARTS = ("overall", "balanced", "head", "body", "tail", "worst")
"""The figures of an attack, in the order tables show them."""

TAIL80 = "tail80"
"""The figure beyond them that evaluations have where they know the class sizes."""


@dataclass(frozen=True)
class RunRecord:
    """Hold what the folder of a run tells.

    metrics and timing: a row per epoch, numbers by column, None where a cell is empty. ae_counts
    [E, C]: adversarial examples predicted as each class, where every epoch tells. counts [C]:
    training images. evaluation: as reat_fast.evaluate writes it; None, and outdated, where it is of
    weights that have been trained since. In all of them classes go from the largest to the
    smallest; order [C]: the numbers that they have in the data set. trained_on: what tells its
    training images from others, as far as the folder has it: train_counts [C], in the data set's
    order, fingerprint and images_sha256. preset: its name, "" where the folder tells none.
    """

    folder: Path
    config: Config
    environment: dict[str, Any]
    class_names: list[str]
    counts: list[int] | None
    metrics: list[dict[str, float | None]]
    ae_counts: list[list[int]]
    timing: list[dict[str, float | None]]
    evaluation: dict[str, Any] | None
    order: list[int]
    outdated: bool
    trained_on: dict[str, Any]
    preset: str

    @property
    def name(self) -> str:
        """Name the run as its folder is named."""
        return self.folder.resolve().name

    @property
    def weights_epoch(self) -> int | None:
        """Return the epoch whose weights were evaluated, where that can be told."""
        evaluation = self.evaluation or {}
        if "weights_epoch" in evaluation:
            return int(evaluation["weights_epoch"])
        of_last = evaluation.get("weights") == LAST
        if of_last and "weights_sha256" in evaluation and len(self.metrics) == self.config.epochs:
            return self.config.epochs  # of a run under way they can be some epochs old
        return None

    @property
    def images_per_second(self) -> float:
        """Images trained on per second, over all epochs; 0 where none was timed."""
        rows = [
            (row["images_per_second"] or 0.0, row["training_seconds"] or 0.0) for row in self.timing
        ]
        seconds = sum(taken for _, taken in rows)
        return sum(speed * taken for speed, taken in rows) / seconds if seconds else 0.0

    @property
    def device(self) -> str:
        """Name the device as people do: the GPU's name, or the CPU's model."""
        gpus = self.environment.get("gpus") or []
        if gpus and self.config.device != "cpu":
            return str(gpus[0].get("name"))
        return str(self.environment.get("cpu") or "unknown device")

    @property
    def protocol(self) -> str:
        """Say under which conditions the figures of the evaluation hold."""
        return self.protocol_of([] if self.weights_epoch is None else [self.weights_epoch])

    def protocol_of(self, epochs: Sequence[int]) -> str:
        """Say so of weights of these epochs, of runs that have all else in common."""
        if self.evaluation is None:
            return "not evaluated yet"
        told, epoch = self.evaluation, ""
        if epochs:
            first, last = min(epochs), max(epochs)
            epoch = f" of epoch {first}" if first == last else f" of epochs {first} to {last}"
        return (
            f"{told.get('dataset', self.config.dataset)}, {told['samples']:,} test images, "
            f"{threat_text({'step_size': self.config.step_size, **told})}, "
            f"{told.get('weights', 'weights')}{epoch}, {told.get('device', 'unknown device')}"
        )


def read_run(folder: Path) -> RunRecord:
    """Read the folder of a run.

    Errors: ValueError naming the folder that is not one of a run, or the file that is damaged.
    """
    settings = folder / "config.json"
    if not settings.is_file():
        raise ValueError(f"{folder}: holds no config.json; give the folder of a run")
    with _reading(settings):
        config = from_json(settings.read_text("utf-8"), "settings")
    class_names, counts, preset = _read_split(folder)
    evaluation = _read_evaluation(folder / EVALUATION, len(class_names))
    if evaluation is not None:
        class_names = class_names or evaluation["class_names"]
        counts = counts or evaluation.get("train_counts")
        evaluation = largest_first({**evaluation, "train_counts": counts})
    order = by_falling_size(counts or [0] * len(class_names))
    outdated = evaluation is not None and not of_these_weights(evaluation, folder)
    metrics, predicted = read_metrics(folder / "metrics.csv")
    if predicted and len(predicted[0]) == len(order):
        predicted = [[row[c] for c in order] for row in predicted]
    return RunRecord(
        folder=folder,
        config=config,
        environment=_read_environment(folder / "env.json"),
        class_names=[class_names[c] for c in order],
        counts=counts and [counts[c] for c in order],
        metrics=metrics,
        ae_counts=predicted,
        timing=_read_timing(folder / "timing.csv"),
        evaluation=None if outdated else evaluation,
        order=order,
        outdated=outdated,
        trained_on={**({"train_counts": counts} if counts else {}), **digests_of_run(folder)},
        preset=preset,
    )


def _read_split(folder: Path) -> tuple[list[str], list[int] | None, str]:
    """Return names and counts of the classes and the preset, empty where the folder lacks them.

    The preset is that of the checkpoint or, in an export, of config.json where no split.json is.
    """
    split = _read_json(folder / "split.json") or {}
    with _reading(folder / "split.json"):
        counts = [int(n) for n in split["train_counts"]] if split else None
        class_names = [str(name) for name in split["class_names"]] if split else []
        if counts is not None and len(counts) != len(class_names):
            raise ValueError("as many counts as classes are needed")
        preset = split.get("preset", "")
        if not isinstance(preset, str):
            raise ValueError("preset is no name")
    if not preset:
        exported = _read_json(folder / "config.json") or {}
        found = exported.get("preset") or glance(folder).get("preset")
        preset = found if isinstance(found, str) else ""
    return class_names, counts, preset


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into one line that names it."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, csv.Error) as error:
        reason = " ".join(str(error).split())[:200]
        cure = "restore it" if file.name == "config.json" else "restore it, or move it away"
        raise ValueError(f"{file}: damaged or not of reat_fast ({reason}); {cure}") from error


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    with _reading(file):
        return read_object(file)


def _read_environment(file: Path) -> dict[str, Any]:
    environment = _read_json(file) or {}
    with _reading(file):
        if not all(isinstance(gpu, dict) for gpu in environment.get("gpus") or ()):
            raise ValueError("gpus are no objects")
    return environment


def _read_evaluation(file: Path, in_split: int) -> dict[str, Any] | None:
    """Read an evaluation; in_split: the classes that split.json tells of, 0 where none does."""
    evaluation = _read_json(file)
    if evaluation is None:
        return None
    with _reading(file):
        evaluation["class_names"] = [str(name) for name in evaluation["class_names"]]
        classes = len(evaluation["class_names"])
        if in_split not in (0, classes):
            raise ValueError(f"{classes} classes, split.json has {in_split}")
        if not {"eps", "samples"} <= evaluation.keys():
            raise ValueError("no eps or no samples")
        refuse_other_types(evaluation)
        for name in ("train_counts", "per_class_samples"):
            if len(evaluation.get(name) or evaluation["class_names"]) != classes:
                raise ValueError(f"as many {name} as classes are needed")
        if not isinstance(evaluation.get("warnings", []), list):
            raise ValueError("warnings are no list")
        if not evaluation["attacks"]:
            raise ValueError("no attack")
        for name, figures in evaluation["attacks"].items():
            if len(figures["per_class"]) != classes:
                raise ValueError(f"{name}: {len(figures['per_class'])} figures, {classes} classes")
            overall = [figures[part] for part in PARTS] + [figures.get(TAIL80)]
            for value in (*overall, *figures["per_class"]):
                if value is not None and not 0 <= value <= 100:
                    raise ValueError(f"{name}: {value} is not a percentage")
    return evaluation


def read_metrics(file: Path) -> tuple[list[dict[str, float | None]], list[list[int]]]:
    """Read metrics.csv: numbers per epoch, and AE predictions [E, C], none where a row lacks them.

    Errors: ValueError naming the file.
    """
    rows, predicted = [], []
    for cells in _read_csv(file):
        with _reading(file):
            words = cells.pop("ae_counts", "").split()
            predicted.append([int(word) for word in words])
            rows.append(_numbers(cells, ("epoch", "loss", "adv_accuracy")))
    if len({len(row) for row in predicted}) > 1 or not all(predicted):
        predicted = []
    return rows, predicted


def _read_timing(file: Path) -> list[dict[str, float | None]]:
    columns = ("epoch", "seconds", "training_seconds", "images_per_second", "warm_up_seconds")
    rows = []
    for cells in _read_csv(file):
        with _reading(file):
            rows.append(_numbers(cells, columns))
    return rows


def _read_csv(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with _reading(file), file.open(newline="", encoding="utf-8") as table:
        reader = csv.DictReader(table)
        if "epoch" not in (reader.fieldnames or ()):
            raise ValueError("no column epoch in the heading")
        rows = list(reader)
        for number, row in enumerate(rows, start=1):
            if None in row or None in row.values():
                raise ValueError(f"row {number} has not as many cells as the heading")
    return rows


def _numbers(cells: dict[str, str], needed: tuple[str, ...]) -> dict[str, float | None]:
    numbers = {name: float(text) if text else None for name, text in cells.items()}
    for name in needed:
        if numbers.get(name) is None:
            raise ValueError(f"no {name} in a row")
    return numbers

"""The folder of a run: which it is, who may write it, what describes it, and its tables."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any

from reat_fast.checkpoint import CHECKPOINT, PREVIOUS, glance
from reat_fast.config import Config
from reat_fast.data import Dataset, Splits
from reat_fast.env import environment
from reat_fast.storage.config_file import from_json, to_json
from reat_fast.storage.json_object import read_object
from reat_fast.storage.weights_file import CheckpointError
from reat_fast.storage.whole_files import write_text
from reat_fast.training.logs import WANDB_ID

DESCRIPTION = ("config.json", "env.json", "split.json")
"""What describe_run writes; the first checkpoint follows it."""


def new_run_dir(run_dir: Path | None, preset: str) -> Path:
    """Choose the folder of a new run: the one asked for, or the next free runs/PRESET-N.

    Errors: CheckpointError when the folder already holds a run or anything else.
    """
    if run_dir is None:
        numbered = (Path("runs") / f"{preset}-{number}" for number in itertools.count(1))
        return next(folder for folder in numbered if not os.path.lexists(folder))  # also links
    if run_dir.exists() and not run_dir.is_dir():
        raise CheckpointError(f"--run-dir {run_dir}: is a file; name a folder")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise CheckpointError(
            f"--run-dir {run_dir}: already holds files; go on with "
            f"--resume {shlex.quote(str(run_dir))} or name another folder"
        )
    return run_dir


def newest_run(folder: Path) -> Path:
    """Return the run below `folder` whose checkpoint was written last.

    Errors: CheckpointError where there is none.
    """
    found = [file for name in (CHECKPOINT, PREVIOUS) for file in folder.glob(f"*/{name}")]
    if not found:
        raise CheckpointError(f"--resume auto: no run with a checkpoint in {folder}; name one")
    return max(found, key=lambda file: file.stat().st_mtime_ns).parent


class FolderLock:
    """Hold a run folder for this process alone, until it ends or lets go; leaves no file behind.

    Errors: CheckpointError where another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            import fcntl

            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise CheckpointError(
                f"{folder}: another process is training in this folder; wait for it, or give "
                "another --run-dir"
            ) from None
        except (ImportError, OSError):
            pass  # a system or file system without locks

    def release(self) -> None:
        """Let another process have the folder."""
        os.close(self._descriptor)


def make_folder(folder: Path, numbered: str = "") -> Path:
    """Make the folder of a run, unless it is there, and return it.

    numbered: the preset of a run that takes the next free runs/PRESET-N. Where another run took
    `folder` meanwhile, the one after it is made.
    Errors: CheckpointError where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=not numbered)
        return folder
    except FileExistsError:
        if not numbered:
            raise CheckpointError(f"--run-dir {folder}: is a file; name a folder") from None
        return make_folder(new_run_dir(None, numbered), numbered)
    except OSError as error:
        raise CheckpointError(
            f"--run-dir {folder}: cannot be made ({error.strerror}); name another folder"
        ) from error


def never_began(folder: Path) -> bool:
    """Say whether a folder is what a run leaves that was killed before its first checkpoint.

    An empty one is; one with a config.json that is not of this program is somebody else's.
    """
    half_written = {f"{name}.part" for name in (*DESCRIPTION, CHECKPOINT)}
    if not folder.is_dir():
        return False
    names = {file.name for file in folder.iterdir() if not _is_of_a_log(file)}
    if "config.json" in names:
        try:
            from_json((folder / "config.json").read_text("utf-8"))
        except (ValueError, OSError):
            return False
    return names <= half_written.union(DESCRIPTION)


def _is_of_a_log(file: Path) -> bool:
    """Say whether a log of --log, which opens before the first checkpoint, has left this."""
    return file.name in ("wandb", WANDB_ID) or file.name.startswith("events.out.tfevents")


def epochs_done(folder: Path) -> int | None:
    """Return how many epochs the checkpoint of a run has behind it, None where none is whole."""
    epoch = glance(folder).get("epoch")
    return epoch if isinstance(epoch, int) else None


def describe_run(
    folder: Path, preset: str, config: Config, dataset: Dataset, splits: Splits, images: str
) -> None:
    """Write what a run is made of: configuration, environment and split, before its first step.

    images: the digest of the training images, "" where there is none.
    """
    split = {
        "preset": preset,
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "image_shape": list(dataset.train.images.shape[1:]),
        "train_counts": splits.counts,
        "held_out": len(splits.held_out),
        "fingerprint": splits.fingerprint,
        "images_sha256": images or None,
    }
    texts = (
        to_json(config),
        json.dumps(environment(), indent=2),
        json.dumps(split, indent=2),
    )
    for name, text in zip(DESCRIPTION, texts, strict=True):
        write_text(folder / name, text + "\n")


def train_counts(run_dir: Path) -> list[int] | None:
    """Return the training images per class of a run or an export, where its folder tells."""
    split = run_dir / "split.json"
    file = split if split.is_file() else run_dir / "config.json"
    if not file.is_file():
        return None
    try:
        counts: Any = read_object(file).get("train_counts")
        if counts is None and file != split:
            return None  # only an export has them there
        return [int(count) for count in counts]
    except (ValueError, TypeError, OverflowError) as error:  # the last for Infinity
        raise CheckpointError(f"{file}: damaged, gives no train_counts ({error})") from None


def write_tables(folder: Path, metrics: list[dict[str, Any]], timing: list[dict[str, Any]]) -> None:
    """Write metrics.csv and timing.csv, a row an epoch; before the first epoch there are none."""
    for name, rows in (("metrics.csv", metrics), ("timing.csv", timing)):
        if rows:
            _write_table(folder / name, rows)
        else:
            (folder / name).unlink(missing_ok=True)


def _write_table(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows of equal columns as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(file, text.getvalue())

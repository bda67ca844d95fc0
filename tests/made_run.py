"""Runs for tests: the training command, and a folder written by hand with hostile class names."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from reat_fast import train
from reat_fast.cli.command import run_command
from reat_fast.config import Config
from reat_fast.reporting.run_record import PARTS
from reat_fast.storage.config_file import to_json

EVIL = ["<script>document.title='executed'</script>", "$x$", "a|b", '" onload="x', "&amp;"]
COUNTS = [400, 200, 100, 50, 10]

SMALL = ["--dataset", "npz", "--model", "resnet8", "--width", "8", "--imbalance", "0.1"]
SMALL += ["--batch-size", "16", "--steps", "2", "--held-out", "0.1", "--eval-batch-size", "32"]
SMALL += ["--lr", "0.05", "--schedule", "onecycle", "--eval-every", "1", "--device", "cpu"]


def run(*arguments: object) -> int:
    """Run reat_fast.train on a command line; return its exit code."""
    return run_command(train.main, [str(argument) for argument in arguments])


def rows(run_dir: Path) -> list[dict[str, str]]:
    """Return the rows of a run's metrics.csv."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(file: Path, **values: Any) -> None:
    """Give fields of a JSON file other values."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def made_run(folder: Path, overall: float = 50.0, **settings: Any) -> Path:
    """Write the folder of a run by hand: five classes, two epochs, clean and PGD-20."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(Config(epochs=2, **settings)))
    machine = {"commit": "0123456789abcdef", "torch": "2.8", "cpu": "Made CPU", "gpus": []}
    (folder / "env.json").write_text(json.dumps(machine))
    (folder / "split.json").write_text(json.dumps({"class_names": EVIL, "train_counts": COUNTS}))
    (folder / "metrics.csv").write_text(
        "epoch,lr,loss,bsl,tail,adv_accuracy,nonfinite,eval_clean,eval_robust,eval_robust_tail,"
        "ae_counts\n"
        "1,0.1,2.0,1.5,0.5,20.0,0,,,,400 200 100 50 10\n"
        "2,0.1,1.0,0.75,0.25,40.0,0,60.0,40.0,10.0,760 0 0 0 0\n"
    )
    (folder / "timing.csv").write_text(
        "epoch,seconds,training_seconds,images_per_second,warm_up_seconds\n"
        "1,12.0,8.0,95.0,1.5\n2,11.0,8.0,79.0,1.5\n"
    )
    robust = {"per_class": [80.0, 60.0, 40.0, None, 20.0]}
    robust |= dict.fromkeys(PARTS, overall)
    clean = {"per_class": [90.0, 80.0, 60.0, None, 40.0], **dict.fromkeys(PARTS, 70.0)}
    evaluation = {
        "samples": 1000,
        "attacks": {"clean": clean, "pgd20": robust},
        "weights": "best.safetensors",
        "weights_epoch": 2,
        "dataset": "cifar10",
        "class_names": EVIL,
        "eps": 8 / 255,
        "step_size": 2 / 255,
        "device": "cuda",
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder

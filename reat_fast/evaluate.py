"""python -m reat_fast.evaluate RUN: accuracy under attack, overall, per class and on the tail."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from reat_fast import checkpoint, report
from reat_fast.attack import ascend, cross_entropy, evaluating
from reat_fast.command import choose_device, parse_flags, run_command
from reat_fast.config import Config, Radius, from_json
from reat_fast.data import ImageSet, head_body_tail, load_dataset
from reat_fast.frozen import FrozenNetwork
from reat_fast.kernels.prepare import prepare
from reat_fast.memory import keep_freed_memory
from reat_fast.networks import Network
from reat_fast.precision import full_precision

ATTACKS = "clean, fgsm, pgd10, pgd20, pgd100 or pgdN"


@dataclass(frozen=True)
class Attack:
    """One attack of an evaluation: steps of signed gradient ascent on the cross-entropy."""

    name: str
    steps: int
    step_size: float
    random_start: bool

    @classmethod
    def from_name(cls, name: str, eps: float, step_size: float) -> Attack:
        """Read an attack by name; eps and step_size in the units of images in [0, 1].

        clean: no attack. fgsm: one step of eps from the clean image (Goodfellow et al., 2015).
        pgdN: N steps of step_size from a random start (Madry et al., 2018).
        Errors: ValueError listing the names.
        """
        match = re.fullmatch(r"pgd([1-9]\d{0,3})", name)
        if name == "clean":
            return cls(name, 0, 0.0, random_start=False)
        if name == "fgsm":
            return cls(name, 1, eps, random_start=False)
        if match:
            return cls(name, int(match[1]), step_size, random_start=True)
        raise ValueError(f"unknown attack {name!r}; attacks are {ATTACKS}")


def evaluate(
    model: Network,
    image_set: ImageSet,
    attacks: Sequence[Attack],
    num_classes: int,
    *,
    eps: float = 8 / 255,
    seed: int = 0,
    batch_size: int = 500,
    limit_batches: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Measure the accuracy of a model on a set, clean and under each attack.

    Computed in true float32, without TF32. The random start of an image depends on (seed, its
    position) alone, so neither the batch size nor the choice of attacks changes a figure. progress
    is called with the number of images after each batch and attack. The mode is left as found.
    Returns {"samples": N, "per_class_samples": [C], "attacks": {name: figures}}; figures, in
    percent: overall, balanced (mean over classes), worst (class), head, body, tail, per_class [C]
    (None where a class has no image).
    """
    weight = next(model.parameters())
    device, precision = weight.device, torch.promote_types(weight.dtype, torch.float32)
    images = torch.from_numpy(image_set.images).to(device)
    labels = torch.from_numpy(image_set.labels).to(device)
    count = len(labels) if limit_batches is None else min(len(labels), limit_batches * batch_size)
    correct = torch.zeros(len(attacks), num_classes, dtype=torch.int64, device=device)
    with evaluating(model), full_precision():
        frozen = FrozenNetwork(model)
        for first in range(0, count, batch_size):
            rows = torch.arange(first, min(first + batch_size, count), device=device)
            pair = prepare(images, rows, seed, 0, eps, gather=True, padding=0, flip=False)
            clean, start = (t.to(precision) for t in pair)
            targets = labels[rows]
            for hits, attack in zip(correct, attacks, strict=True):
                adv = ascend(
                    frozen,
                    start if attack.random_start else clean,
                    clean,
                    targets,
                    eps=eps,
                    step_size=attack.step_size,
                    steps=attack.steps,
                    loss=cross_entropy,
                )
                hits += _hits(model, adv, targets, num_classes)
                if progress is not None:
                    progress(len(rows))
    samples = labels[:count].bincount(minlength=num_classes).tolist()
    return {
        "samples": count,
        "per_class_samples": samples,
        "attacks": {
            attack.name: figures(hits, samples)
            for attack, hits in zip(attacks, correct.tolist(), strict=True)
        },
    }


@torch.no_grad()
def _hits(model: Network, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count the right predictions per class [C]; may not sync."""
    right = model(images).argmax(1) == labels
    return torch.zeros(num_classes, dtype=torch.int64, device=labels.device).scatter_add_(
        0, labels, right.long()
    )


def figures(correct: Sequence[int], samples: Sequence[int]) -> dict[str, Any]:
    """Turn right predictions and images per class into percentages; see evaluate."""
    per_class = [100 * c / n if n else None for c, n in zip(correct, samples, strict=True)]

    def mean(classes: Sequence[int]) -> float | None:
        present = [value for c in classes if (value := per_class[c]) is not None]
        return sum(present) / len(present) if present else None

    present = [value for value in per_class if value is not None]
    return {
        "overall": 100 * sum(correct) / max(sum(samples), 1),
        "balanced": mean(range(len(samples))),
        "worst": min(present) if present else None,
        **{part: mean(classes) for part, classes in head_body_tail(len(samples)).items()},
        "per_class": per_class,
    }


@dataclass(frozen=True)
class Options:
    """Evaluate a trained classifier on the full balanced test set."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, a .safetensors file or a checkpoint-last.pt."""
    attacks: tuple[str, ...] = ("clean", "pgd20")
    """clean, fgsm, pgd10, pgd20, pgd100 or any pgdN."""
    eps: Radius = 8 / 255
    """L-infinity radius, on images in [0, 1]."""
    step_size: Radius = 2 / 255
    """Step of the PGD attacks."""
    dataset: str | None = None
    """Data set; unset: the one the run was trained on."""
    data: Path | None = None
    """Where the data is; unset: where the run found it."""
    subset: int | None = None
    """Evaluate on so many test images, evenly spread over the set; unset: on all."""
    batch_size: int = 500
    """Images per batch; changes no figure."""
    seed: int = 0
    """Seed of the random starts."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """JSON file to write; unset: evaluation.json in the folder of the run."""

    def __post_init__(self) -> None:
        for name in ("subset", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        for name in ("eps", "step_size"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: not in [0, 1]")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, arguments, "python -m reat_fast.evaluate")
    attacks = [Attack.from_name(name, options.eps, options.step_size) for name in options.attacks]
    weights = checkpoint.find_weights(options.run)
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    model, spec = checkpoint.load_model_and_spec(weights, device)
    folder = options.run if options.run.is_dir() else options.run.parent
    config = _run_config(folder)
    dataset = load_dataset(options.dataset or config.dataset, options.data or config.data)
    if dataset.num_classes != spec.num_classes:
        raise ValueError(
            f"--dataset {dataset.name}: has {dataset.num_classes} classes, "
            f"{weights} was trained on {spec.num_classes}"
        )
    test = dataset.test if options.subset is None else evenly(dataset.test, options.subset)
    began = time.perf_counter()
    total = len(test.labels) * len(attacks)
    with tqdm(total=total, unit=" images", leave=False, disable=not sys.stderr.isatty()) as bar:
        result = evaluate(
            model,
            test,
            attacks,
            spec.num_classes,
            eps=options.eps,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=bar.update,
        )
    result |= {
        "weights": weights.name,
        "dataset": dataset.name,
        "class_names": list(dataset.class_names),
        "eps": options.eps,
        "step_size": options.step_size,
        "seed": options.seed,
        "device": str(device),
        "seconds": round(time.perf_counter() - began, 3),
    }
    counts = checkpoint.train_counts(folder)
    if counts is not None:
        result["train_counts"] = counts
    out = options.out or folder / "evaluation.json"
    checkpoint.write_text(out, json.dumps(result, indent=2) + "\n")
    print(report.accuracy_table(result))
    print(f"{out} written ({result['seconds']:.1f} s on {device})")
    return 0


def evenly(image_set: ImageSet, count: int) -> ImageSet:
    """Take `count` images evenly spread over a set, which may be sorted by class."""
    total = len(image_set.labels)
    rows = [i * total // min(count, total) for i in range(min(count, total))]
    return dataclasses.replace(
        image_set, images=image_set.images[rows], labels=image_set.labels[rows]
    )


def _run_config(folder: Path) -> Config:
    file = folder / "config.json"
    return from_json(file.read_text("utf-8"), str(file)) if file.is_file() else Config()


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

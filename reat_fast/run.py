"""One training run: its data, model and step on the device, and the folder they report to."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import time
from typing import Any

import torch

from reat_fast import checkpoint, report
from reat_fast.attack import pgd
from reat_fast.checkpoint import CheckpointError, ModelSpec
from reat_fast.config import to_json
from reat_fast.data import Dataset, ImageSet, Splits, load_dataset, make_splits
from reat_fast.env import environment
from reat_fast.evaluate import Attack, evaluate, evenly
from reat_fast.frozen import FrozenNetwork
from reat_fast.graph import CapturedStep
from reat_fast.loaders import Batch
from reat_fast.loaders.resident import ResidentLoader
from reat_fast.memory import keep_freed_memory
from reat_fast.networks import Network
from reat_fast.plan import Plan
from reat_fast.precision import resolve_precision, use_precision
from reat_fast.progress import duration
from reat_fast.reference_step import ReferenceStep
from reat_fast.step import (
    TrainStep,
    make_optimizer,
    resolve_attack_loss,
)

SELECTION = {"held-out": ("pgd10", "balanced"), "official": ("pgd20", "overall")}
"""The attack and the figure that choose the best epoch."""


class Run:
    """One training run: data, model and step on the device, and the folder they report to."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config = config = plan.config
        self.device = plan.device
        self.dataset: Dataset = load_dataset(config.dataset, config.data)
        self.splits: Splits = make_splits(
            self.dataset,
            imbalance=config.imbalance,
            profile=config.profile,
            largest=config.largest,
            held_out=config.held_out,
            seed=config.split_seed,
        )
        torch.manual_seed(config.seed)
        self.spec = ModelSpec(
            name=config.model,
            num_classes=self.dataset.num_classes,
            in_channels=self.dataset.train.images.shape[-1],
            width=config.width,
            stem_stride=config.stem_stride,
            class_names=self.dataset.class_names,
        )
        use_precision(config, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.model: Network = self.spec.build().to(
            self.device,
            memory_format=torch.channels_last,  # type: ignore[call-overload]
        )
        self.optimizer = make_optimizer(self.model, config)
        step_class = TrainStep if config.fused else ReferenceStep
        self.step = step_class(self.model, self.optimizer, self.splits.counts, config)
        self.loader = ResidentLoader(
            self.splits.train, config.batch_size, self.device, seed=config.seed
        )
        batches = len(self.loader)
        self.batches = min(batches, config.limit_batches or batches)
        self.metrics: list[dict[str, Any]] = []
        self.timing: list[dict[str, Any]] = []
        self.best: dict[str, float] | None = None
        self._captured: CapturedStep | None = None
        if plan.state is not None:
            self._load(plan.state)

    @property
    def epochs_done(self) -> int:
        """Whole epochs behind this run."""
        return len(self.metrics)

    @property
    def captures(self) -> bool:
        """Whether the step is replayed as a CUDA graph."""
        return self.device.type == "cuda" and self.config.fused and self.config.graph != "off"

    def take_step(self, batch: Batch) -> None:
        """Take one training step on a batch of the loader.

        Errors: ValueError where the step cannot be captured.
        """
        if self.captures and self._captured is None and len(batch.labels) == self.loader.batch_size:
            try:
                self._captured = CapturedStep(self.step, batch)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"--graph {self.config.graph}: the step cannot be captured ({reason}); "
                    "go on with --graph off"
                ) from error
        (self._captured or self.step).train_on(batch)

    def announce(self) -> None:
        """Print what will run, why, and how long it should take."""
        config, counts = self.config, self.splits.counts
        ratio = max(counts) / min(counts)
        print(
            f"preset {self.plan.preset} ({self.plan.reason}); "
            f"expected time {duration(self.expected_seconds())} on {device_name(self.device)}, "
            "from one timed pass"
        )
        print(
            f"{self.dataset.name}: {sum(counts):,} training images in {len(counts)} classes of "
            f"{max(counts):,} to {min(counts):,} (ratio {ratio:.0f}), "
            f"{len(self.splits.held_out):,} held out, {len(self.splits.test):,} test images; "
            f"{config.model}, {sum(p.numel() for p in self.model.parameters()):,} parameters"
        )
        if config.fused and resolve_attack_loss(config) == "ce" and config.attack_loss == "auto":
            print(
                "attack: plain cross-entropy; REAT's RBL weights cannot change an adversarial "
                "example while BatchNorm is in eval mode"
            )
        how = "one CUDA graph" if self.captures else "eager"
        print(f"step: {resolve_precision(config, self.device)}, {how}")
        if config.graph == "on" and not self.captures:
            print(f"--graph on: {self.device} has no CUDA graphs, so steps run eagerly")
        print(f"run folder {self.plan.run_dir}", flush=True)

    def expected_seconds(self) -> float:
        """Guess the seconds that are left from one attack step on a few images.

        Counted in such passes, forward plus gradient: an image costs `steps` in the attack and 1.5
        in the update, and one per step of an evaluation.
        """
        config = self.config
        images = torch.from_numpy(self.splits.train.images[: min(64, config.batch_size)])
        images = images.to(self.device).permute(0, 3, 1, 2) / 255
        labels = torch.from_numpy(self.splits.train.labels[: len(images)]).to(self.device)
        low = torch.bfloat16 if resolve_precision(config, self.device) == "bf16" else None
        frozen = FrozenNetwork(self.model, low)

        def one_pass() -> float:
            began = time.perf_counter()
            pgd(frozen, images, labels, steps=1).sum().item()
            return time.perf_counter() - began

        one_pass()
        seconds = min(one_pass() for _ in range(3)) / len(images)
        epochs = config.epochs - self.epochs_done
        per_epoch = min(self.batches * config.batch_size, len(self.splits.train))
        passes = epochs * per_epoch * (config.steps + 1.5)
        if config.evaluation != "none":
            attack, _ = SELECTION[config.evaluation]
            evaluations = math.ceil(epochs / self._eval_every())
            passes += evaluations * len(self._selection_set()) * int(attack[3:])
        passes += len(self._limited(self.splits.test)) * 20.5
        return passes * seconds

    def _eval_every(self) -> int:
        return 1 if self.config.evaluation == "official" else self.config.eval_every

    def _selection_set(self) -> ImageSet:
        official = self.config.evaluation == "official"
        return self._limited(self.splits.test if official else self.splits.held_out)

    def _limited(self, image_set: ImageSet) -> ImageSet:
        if self.config.limit_batches is None:
            return image_set
        return evenly(image_set, self.config.limit_batches * self.config.batch_size)

    def evaluate_epoch(self, epoch: int) -> dict[str, Any]:
        """Evaluate where the plan says so and keep the weights if they are the best so far."""
        columns: dict[str, Any] = {"eval_clean": "", "eval_robust": "", "eval_robust_tail": ""}
        config, last = self.config, epoch + 1 == self.config.epochs
        selection = self._selection_set()
        if config.evaluation == "none" or not len(selection):
            return columns
        if (epoch + 1) % self._eval_every() and not last:
            return columns
        name, figure = SELECTION[config.evaluation]
        attacks = [Attack.from_name(n, config.eps, config.step_size) for n in ("clean", name)]
        network = self.step.evaluated_network()
        result = evaluate(
            network,
            selection,
            attacks,
            self.dataset.num_classes,
            eps=config.eps,
            seed=config.seed,
            batch_size=config.eval_batch_size,
        )["attacks"]
        robust = result[name][figure]
        if self.best is None or robust >= self.best["robust"]:
            self.best = {"epoch": epoch + 1, "robust": robust}
            checkpoint.save_weights(self.plan.run_dir / "best.safetensors", network, self.spec)
        return {
            "eval_clean": result["clean"][figure],
            "eval_robust": robust,
            "eval_robust_tail": result[name]["tail"] if result[name]["tail"] is not None else "",
        }

    def test(self) -> dict[str, Any]:
        """Evaluate the chosen weights on the test set, once; write the figures and pictures."""
        config, run_dir = self.config, self.plan.run_dir
        best = config.select == "best" and self.best is not None
        weights = run_dir / ("best.safetensors" if best else "last.safetensors")
        model = checkpoint.load_model(weights, self.device)
        test = self._limited(self.splits.test)
        began = time.perf_counter()
        result = evaluate(
            model,
            test,
            [Attack.from_name(n, config.eps, config.step_size) for n in ("clean", "pgd20")],
            self.dataset.num_classes,
            eps=config.eps,
            seed=config.seed,
            batch_size=config.eval_batch_size,
        )
        result |= {
            "weights": weights.name,
            "weights_epoch": int(self.best["epoch"]) if best and self.best else config.epochs,
            "dataset": self.dataset.name,
            "class_names": list(self.dataset.class_names),
            "train_counts": self.splits.counts,
            "eps": config.eps,
            "step_size": config.step_size,
            "seed": config.seed,
            "device": str(self.device),
            "seconds": round(time.perf_counter() - began, 3),
        }
        checkpoint.write_text(run_dir / "evaluation.json", json.dumps(result, indent=2) + "\n")
        title = f"{self.dataset.name}, {config.model}, {self.plan.preset}, {weights.stem} weights"
        report.draw_accuracy(result, run_dir / "accuracy.png", title)
        report.draw_learning(run_dir / "metrics.csv", run_dir / "learning.png")
        return result

    def open_folder(self) -> None:
        """Write what describes the run, before its first step."""
        run_dir = self.plan.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(run_dir / "config.json", to_json(self.config) + "\n")
        checkpoint.write_text(run_dir / "env.json", json.dumps(environment(), indent=2) + "\n")
        split = {
            "dataset": self.dataset.name,
            "class_names": list(self.dataset.class_names),
            "train_counts": self.splits.counts,
            "held_out": len(self.splits.held_out),
            "fingerprint": self.splits.fingerprint,
        }
        checkpoint.write_text(run_dir / "split.json", json.dumps(split, indent=2) + "\n")

    def save(self, metrics: dict[str, Any], timing: dict[str, Any]) -> None:
        """Add an epoch to the tables; write them, the newest weights and the checkpoint."""
        run_dir = self.plan.run_dir
        predicted = self.step.statistics.ae_counts.tolist()
        self.metrics.append({**metrics, "ae_counts": " ".join(map(str, predicted))})
        self.timing.append(timing)
        checkpoint.write_text(run_dir / "metrics.csv", _csv(self.metrics))
        checkpoint.write_text(run_dir / "timing.csv", _csv(self.timing))
        network = self.step.evaluated_network()
        checkpoint.save_weights(run_dir / "last.safetensors", network, self.spec)
        state = {
            "preset": self.plan.preset,
            "config": to_json(self.config),
            "model_spec": dataclasses.asdict(self.spec),
            "fingerprint": self.splits.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step.state_dict(),
            "metrics": self.metrics,
            "timing": self.timing,
            "best": self.best,
        }
        checkpoint.save_checkpoint(run_dir, state)

    def _load(self, state: dict[str, Any]) -> None:
        if state["fingerprint"] != self.splits.fingerprint:
            raise CheckpointError(
                f"--resume {self.plan.run_dir}: the training images are not those the run was "
                "begun with; name the same data with --data"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.load_state_dict(state["step"])
        self.metrics, self.timing, self.best = state["metrics"], state["timing"], state["best"]


def device_name(device: torch.device) -> str:
    """Name a device for people: the GPU's name, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()

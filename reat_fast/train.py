"""python -m reat_fast.train [preset] --fused: train, evaluate, and leave a run folder behind."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import torch

from reat_fast import checkpoint, report
from reat_fast.command import run_command
from reat_fast.config import fraction_text
from reat_fast.plan import make_plan
from reat_fast.progress import Progress, TrainingClock
from reat_fast.run import Run
from reat_fast.schedule import learning_rate


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    run = Run(make_plan(arguments))
    run.announce()
    run.open_folder()
    try:
        train(run)
    except KeyboardInterrupt:
        print(
            f"stopped after epoch {run.epochs_done}; go on with: "
            f"python -m reat_fast.train --resume {run.plan.run_dir}",
            file=sys.stderr,
        )
        return 130
    result = run.test()
    run_dir = run.plan.run_dir
    print(f"\n{report.accuracy_table(result)}\n")
    print(
        f"{result['weights']} (epoch {result['weights_epoch']}) on {result['samples']:,} of "
        f"{len(run.splits.test):,} test images, eps {fraction_text(result['eps'])}; figures in "
        f"{run_dir / 'evaluation.json'}, pictures in {run_dir / 'accuracy.png'} and "
        f"{run_dir / 'learning.png'}"
    )
    return 0


def train(run: Run) -> None:
    """Run the epochs that are left, saving after each."""
    steps = (run.config.epochs - run.epochs_done) * run.batches
    clock = TrainingClock(steps)
    progress = Progress(steps, run.config.epochs, clock)
    try:
        for epoch in range(run.epochs_done, run.config.epochs):
            train_epoch(run, epoch, clock, progress)
    finally:
        progress.close()


def train_epoch(run: Run, epoch: int, clock: TrainingClock, progress: Progress) -> None:
    """Take the steps of one epoch, evaluate where it is due, and save."""
    before, began = clock.training_seconds, time.perf_counter()
    clock.resume()
    lr = 0.0
    for number, batch in zip(range(run.batches), run.loader.epoch(epoch), strict=False):
        lr = learning_rate(run.config, epoch + number / run.batches)
        set_learning_rate(run.optimizer, lr)
        run.take_step(batch)
        means = None
        if clock.warm_up_seconds is None or progress.due():
            means = run.step.running_means()  # waits for the device, so the clock is honest
            _refuse_nonfinite(means["loss"], epoch, number, run.plan.run_dir)
        clock.step(len(batch.labels))
        progress.step(epoch + 1, means if progress.due() else None)
    means = run.step.end_epoch()
    clock.catch_up()
    _refuse_nonfinite(means["loss"], epoch, run.batches - 1, run.plan.run_dir)
    evaluation = run.evaluate_epoch(epoch)
    timing = {
        "epoch": epoch + 1,
        "seconds": round(time.perf_counter() - began, 3),
        "training_seconds": round(clock.training_seconds - before, 3),
        "images_per_second": round(clock.images_per_second, 1),
        "warm_up_seconds": round(clock.warm_up_seconds or 0.0, 3),
    }
    run.save({"epoch": epoch + 1, "lr": lr, **means, **evaluation}, timing)
    shown = {name[5:]: value for name, value in evaluation.items() if value != ""}
    note = "".join(f"  {name} {value:.1f} %" for name, value in shown.items())
    progress.epoch(epoch + 1, means, note)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate, in place where it is a tensor on the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def _refuse_nonfinite(loss: float, epoch: int, batch: int, run_dir: Path) -> None:
    if math.isfinite(loss):
        return
    kept = run_dir / checkpoint.CHECKPOINT
    advice = f"; the state after epoch {epoch} is in {kept}" if kept.exists() else ""
    raise FloatingPointError(
        f"the loss is not finite in epoch {epoch + 1}, by batch {batch + 1}: lower --lr{advice}"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""What a run says when the device's memory or its numbers give out."""

from __future__ import annotations

import copy
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from reat_fast import checkpoint
from reat_fast.cli.command import is_out_of_memory
from reat_fast.engine.distributed import split
from reat_fast.training.run import Run

SMALLEST_SCALE = 1 / 32
"""How far --on-nonfinite rollback lowers the learning rate before it gives up."""


def refuse_nonfinite(run: Run) -> None:
    """Stop the run where a loss was NaN or infinite; waits for the device.

    Errors: FloatingPointError naming the step and the last good checkpoint.
    """
    updates = run.config.replays if run.config.attack == "free" else 1
    step = int(run.step.bad_step) // updates
    if step >= 0:
        raise _fault(run, "loss", step)


def refuse_nonfinite_weights(run: Run) -> None:
    """Stop the run where weights or statistics are NaN or infinite; waits for the device.

    An update that overflows shows in the loss of the next step only, and the last has none.
    Errors: FloatingPointError naming the step before and the last good checkpoint.
    """
    numbers = [t for t in run.model.state_dict().values() if t.is_floating_point()]
    if not torch.stack([t.isfinite().all() for t in numbers]).all():
        raise _fault(run, "state of the network", run.batch - 1)


def _fault(run: Run, what: str, step: int) -> FloatingPointError:
    file = run.folder / checkpoint.CHECKPOINT
    fault = f"the {what} is not finite in epoch {run.epoch + 1}, step {step + 1}"
    if run.config.on_nonfinite == "rollback":  # roll_back says what comes of it
        return FloatingPointError(fault)
    return FloatingPointError(f"{fault}: lower --lr{_way_back(run, file)}")


def _way_back(run: Run, file: Path) -> str:
    """Say where the state before a fault is, and how to go on from it at a lower rate."""
    if not file.is_file():
        return ""
    folder = shlex.quote(str(run.folder))
    return (
        f" in a new run, or go on with --resume {folder} --on-nonfinite rollback; the state before "
        f"it is in {file}"
    )


def diverged(run: Run, fault: FloatingPointError, saved: bool) -> FloatingPointError:
    """Name the epoch and the state before it where an evaluation found no numbers.

    saved: whether the last checkpoint has the network that was evaluated.
    """
    if run.config.on_nonfinite == "rollback":
        return FloatingPointError(f"{fault}, in epoch {run.epoch + 1}")
    file = run.folder / (checkpoint.PREVIOUS if saved else checkpoint.CHECKPOINT)
    # --resume takes the last checkpoint, which would only fail again.
    kept = f"; the state before it is in {file}" if saved and file.is_file() else ""
    return FloatingPointError(
        f"{fault}, in epoch {run.epoch + 1}: lower --lr{kept or _way_back(run, file)}"
    )


def roll_back(run: Run, fault: FloatingPointError) -> str:
    """Go back to the last checkpoint at half the learning rate; returns what was done.

    Raises the fault again where the run should stop, has no checkpoint, or was halved too often.
    """
    if run.config.on_nonfinite == "stop":
        raise fault
    halved = run.lr_scale / 2
    if not checkpoint.has_checkpoint(run.folder) or halved < SMALLEST_SCALE:
        given_up = f", at {run.lr_scale:g} of the learning rate" if run.lr_scale < 1 else ""
        raise FloatingPointError(f"{fault}{given_up}: lower --lr in a new run") from fault
    state, file = checkpoint.load_newest_checkpoint(run.folder)
    run.load_state(state, file)
    run.lr_scale = halved
    return f"back to {file} with the learning rate times {halved:g}"


def refuse_single_images(run: Run) -> None:
    """Try a batch of 1 image where an epoch has one, which may be its last; see explained_faults.

    Processes that normalise together see more, and are left to their steps.
    """
    sizes = [run.images_in(batch) for batch in (0, run.batches - 1)]
    parts = [part for size in sizes for part in split(size, run.config.accumulate)]
    if run.world.size > 1 or min(parts) > 1:
        return
    height, width, channels = run.splits.train.images.shape[1:]
    image = torch.zeros(1, channels, height, width, device=run.device)
    devices = [run.device] if run.device.type == "cuda" else []  # not all, which would be set up
    with torch.random.fork_rng(devices), torch.no_grad():
        copy.deepcopy(run.model).train()(image)


@contextmanager
def explained_faults(run: Run) -> Iterator[None]:
    """Turn no memory, no disk, a batch too small or a folder gone into a line with the cure."""
    config = run.config
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        given = f"--batch-size {config.batch_size}"
        given += f" --accumulate {config.accumulate}" if config.accumulate > 1 else ""
        whole = config.batch_size // config.accumulate > 1
        cure = "add --drop-last, or choose other numbers" if whole else "give more images a step"
        raise ValueError(
            f"{given}: a batch of 1 image leaves BatchNorm one value per channel; {cure}"
        ) from error
    except OSError as error:
        if not run.world.main or run.log is None:
            raise
        if run.folder.is_dir():
            if "cannot be written (" not in str(error) or not checkpoint.has_checkpoint(run.folder):
                raise
            again = f"--resume {shlex.quote(str(run.folder))}"
            raise OSError(f"{error}; make that possible, then go on with {again}") from error
        raise OSError(
            f"{run.folder}: was moved or removed while the run trained; go on with --resume and "
            "the place where it is now"
        ) from error
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        device = "GPU memory" if run.device.type == "cuda" else "memory"
        raise ValueError(
            f"out of {device} in epoch {run.epoch + 1}: lower --eval-batch-size (now "
            f"{config.eval_batch_size}), which --resume takes, or begin anew with a lower "
            f"--batch-size (now {config.batch_size}) or a higher --accumulate (now "
            f"{config.accumulate}), which computes a batch in parts"
        ) from error

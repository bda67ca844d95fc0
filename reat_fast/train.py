"""python -m reat_fast.train [preset] --fused: train, evaluate, and leave a run folder behind."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack
from typing import Any

import torch

from reat_fast.checkpoint import has_checkpoint
from reat_fast.cli.command import refused_once, run_command
from reat_fast.cli.radius import fraction_text
from reat_fast.cli.terminal import READER_GONE, duration, reader_has_gone
from reat_fast.engine.distributed import FailedElsewhere, World
from reat_fast.engine.memory import peak_memory
from reat_fast.engine.stopping import Stopped, StopRequest
from reat_fast.evaluation.saved import EVALUATION
from reat_fast.reporting.tables import accuracy_table
from reat_fast.training import gauge, selection
from reat_fast.training.announcement import announce
from reat_fast.training.faults import (
    diverged,
    explained_faults,
    refuse_nonfinite,
    refuse_nonfinite_weights,
    refuse_single_images,
    roll_back,
)
from reat_fast.training.plan import Plan, make_plan
from reat_fast.training.progress import Progress, TrainingClock
from reat_fast.training.run import Run
from reat_fast.training.schedule import learning_rate


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    world = World.from_environment()
    with refused_once(world):
        plan = make_plan(arguments, world)
    stop = StopRequest(world)
    with ExitStack() as noticing:
        try:
            with world.joined(plan.device):
                # Not before: SIGTERM has to end a process that waits for one that refused to start.
                noticing.enter_context(stop)
                return run_plan(plan, stop)
        except Stopped as stopped:
            if world.main:
                print(f"stopped; {_go_on(plan)}", file=sys.stderr)
            return stopped.code
        except FailedElsewhere:
            return stop.stopped().code if stop.asked else 1
        except ConnectionError as error:
            if reader_has_gone(error):
                return READER_GONE
            print(f"error: {error}; {_go_on(plan)}", file=sys.stderr)
            return stop.stopped().code if stop.asked else 1


def run_plan(plan: Plan, stop: StopRequest) -> int:
    """Train and test as planned; returns the exit code."""
    run = Run(plan)
    try:
        with explained_faults(run):
            if plan.state is None:
                refuse_single_images(run)
            if run.world.main and not run.config.quiet:
                announce(run)
            if run.world.main and plan.state is None:
                selection.refuse_damaged(run)
            if run.world.main and run.changed_code:
                changed = f"changed since the run was begun: {run.changed_code}"
                print(changed, file=sys.stderr, flush=True)
            run.open_folder()
            if run.log is not None and not run.config.quiet:
                for line in (f"run folder {run.folder}", *run.log.where):
                    print(line, flush=True)
            train(run, stop)
            test(run, stop)
    finally:
        run.close()
    return 0


def train(run: Run, stop: StopRequest | None = None) -> None:
    """Run what is left, saving as often as is affordable; see take_steps and Run.finish_epoch."""
    stop = stop or StopRequest()
    clock = TrainingClock(run.work_left)
    quiet = run.config.quiet or not run.world.main
    progress = Progress(run.config.epochs, clock, quiet=quiet)
    try:
        while run.epoch < run.config.epochs:
            try:
                train_epoch(run, clock, progress, stop)
            except FloatingPointError as error:
                progress.say(f"{error}; {roll_back(run, error)}")
                progress.expect(run.work_left)
    finally:
        progress.close()


def train_epoch(run: Run, clock: TrainingClock, progress: Progress, stop: StopRequest) -> None:
    """Take the steps that are left of an epoch, evaluate where due, save where affordable."""
    epoch = run.epoch
    run.epoch_time.begin(clock)
    clock.begin_epoch()
    take_steps(run, clock, progress, stop)
    lr = learning_rate(run.config, epoch + (run.batches - 1) / run.batches) * run.lr_scale
    evaluation = evaluate_epoch(run, clock, stop)
    means = run.step.end_epoch()
    spent = run.epoch_time.spent()
    training = spent["training"]
    waiting = 100 * spent["waiting"] / training if training else 0.0
    timing = {
        "epoch": epoch + 1,
        "seconds": round(spent["seconds"], 3),
        "training_seconds": round(training, 3),
        "images_per_second": round(clock.images_per_second, 1),
        "waiting_for_data_percent": round(waiting, 2),
        "warm_up_seconds": round(clock.warm_up_seconds or 0.0, 3),
        "peak_memory_mib": round(peak_memory(run.device) / 2**20),
    }
    run.finish_epoch({"epoch": epoch + 1, "lr": lr, **means, **evaluation}, timing)
    shown = {name[5:]: value for name, value in evaluation.items() if value != ""}
    note = "".join(f"  {name} {value:.1f} %" for name, value in shown.items())
    if run.config.profile:
        note += f"  waited for data {waiting:.2f} % of {training:.1f} s"
    progress.epoch(epoch + 1, means, note)


def take_steps(run: Run, clock: TrainingClock, progress: Progress, stop: StopRequest) -> None:
    """Take the steps of the running epoch from where the run stands, saving each --save-minutes.

    Errors: Stopped, with everything saved, where the run was asked to end.
    """
    clock.resume()
    batches, work = run.loader.epoch(run.epoch, run.batch), run.step_work
    while run.batch < run.batches:
        batch = next(batches)
        clock.waited()
        progressed = run.epoch + run.batch / run.batches
        set_learning_rate(run.optimizer, learning_rate(run.config, progressed) * run.lr_scale)
        run.take_step(batch)
        means = None
        if clock.warm_up_seconds is None or progress.due():
            means = run.step.running_means()  # waits for the device: the clock is honest
            refuse_nonfinite(run)
        clock.step(run.images_in(run.batch - 1), work)
        progress.step(run.epoch + 1, means if progress.due() else None)
        if stop.agreed(run.epoch * run.batches + run.batch):
            save(run, clock)
            raise stop.stopped()
        if run.save_pace.age > 60 * run.config.save_minutes:
            save(run, clock)


def evaluate_epoch(run: Run, clock: TrainingClock, stop: StopRequest) -> dict[str, Any]:
    """Evaluate where that is due, the run saved before where that is affordable; see selection.

    Errors: Stopped, with everything saved; FloatingPointError with the state to go back to.
    """
    # It takes long enough to be interrupted, but may find that the network diverged.
    due = selection.evaluation_is_due(run, run.epoch) and run.config.on_nonfinite != "rollback"
    saved = due and run.save_pace.affordable()
    if saved:
        save(run, clock)
    refuse_nonfinite(run)
    refuse_nonfinite_weights(run)
    clock.catch_up()  # these waited for the device
    try:
        return selection.evaluate_epoch(run, run.epoch, _tick(stop))
    except Stopped:
        save(run, clock)
        raise
    except FloatingPointError as error:
        raise diverged(run, error, saved) from error


def save(run: Run, clock: TrainingClock) -> None:
    """Save where the run stands; a state that is not finite never takes the place of a good one."""
    refuse_nonfinite(run)
    refuse_nonfinite_weights(run)
    clock.catch_up()  # these waited for the device
    run.save()
    clock.resume()


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of an optimizer of make_optimizer, in place."""
    for group in optimizer.param_groups:
        group["lr"].fill_(value)


def test(run: Run, stop: StopRequest) -> None:
    """Test the chosen weights and print the table."""
    main = run.world.main
    if main and not run.config.quiet:
        images = len(run.limited(run.splits.test))
        left = duration(selection.expected_seconds(run))
        print(f"testing on {images:,} images, about {left}", flush=True)
    result = selection.test(run, _tick(stop))
    if not main:
        return
    if run.log is not None:
        run.log.result(result)
    print(f"\n{accuracy_table(result)}\n")
    print(
        f"{result['weights']} (epoch {result['weights_epoch']}) on {result['samples']:,} of "
        f"{len(run.splits.test):,} test images, eps {fraction_text(result['eps'])}; peak memory "
        f"{peak_memory(run.device) / 2**30:.1f} GiB; figures in {run.folder / EVALUATION}, "
        f"pictures in {run.folder / 'accuracy.png'} and {run.folder / 'learning.png'}"
    )
    share = None if run.config.quiet else gauge.penalty_share(run)
    if share is not None:
        print(
            f"tail penalty ({run.config.tail}): with the last weights its gradient by the features "
            f"has {100 * share:.2g} % of the length of balanced softmax's"
        )


def _tick(stop: StopRequest) -> selection.Tick:
    """Let an evaluation end where the run was asked to."""

    def tick(_: int) -> None:
        if stop.asked:
            raise stop.stopped()

    return tick


def _go_on(plan: Plan) -> str:
    size = plan.world.size  # with another number the run would round otherwise
    program = "python" if size == 1 else f"torchrun --nproc-per-node {size}"
    again = f"go on with: {program} -m reat_fast.train --resume"
    if not plan.world.main and plan.config.run_dir is None and plan.state is None:
        return f"{again} auto"  # the main one numbered it
    if not has_checkpoint(plan.run_dir):
        return "nothing was saved yet: start it again"
    return f"{again} {shlex.quote(str(plan.run_dir))}"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""What a run says of itself before its first step: what it is made of, and what will not act."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch

from reat_fast.cli.command import flag
from reat_fast.cli.radius import fraction_text
from reat_fast.cli.terminal import counted, duration, some
from reat_fast.config import PRESETS, SHARES, Config, in_proportion
from reat_fast.data import AS_IS, UNEVEN
from reat_fast.engine.precision import resolve_precision
from reat_fast.engine.step_attack import resolve_form
from reat_fast.methods.attacks import EARLY_ATTACK, AttackName, plan_attack, resolve_attack_loss
from reat_fast.methods.idle import acts, idle_fields
from reat_fast.training import selection
from reat_fast.training.run import Run


def announce(run: Run) -> None:
    """Print what will run, why, and how long it should take."""
    plan = run.plan
    print(
        f"preset {plan.preset} ({plan.reason}); "
        f"expected time {duration(selection.expected_seconds(run))} on {_place(run)}, "
        "from one timed pass"
    )
    for part in (_data, _attack, _schedule, _average, _idle, _step):
        for line in part(run):
            print(line)
    sys.stdout.flush()


def _data(run: Run) -> Iterator[str]:
    config, counts = run.config, run.splits.counts
    yield (
        f"{run.dataset.name}: {sum(counts):,} training images in {len(counts)} classes of "
        f"{max(counts):,} to {min(counts):,} (ratio {max(counts) / min(counts):.0f}), "
        f"{len(run.splits.held_out):,} held out, {len(run.splits.test):,} test images; "
        f"{config.model}, {sum(p.numel() for p in run.model.parameters()):,} parameters"
    )
    own = np.bincount(run.dataset.train.labels, minlength=len(counts))
    drawn = config.imbalance_profile != "as-is" and config.largest is None
    if drawn and own.max() > UNEVEN * own.min():
        yield (
            f"--imbalance {config.imbalance:g}: drawn from classes that have {own.max():,} to "
            f"{own.min():,} images themselves, so none gets more than {own.min():,}; "
            f"{AS_IS} takes all {own.sum():,} as they are"
        )
    held_out = len(run.splits.held_out)
    if held_out and config.evaluation != "held-out":
        yield (
            f"--evaluation {config.evaluation}: nothing looks at the {held_out:,} images that are "
            "held out; --held-out 0 trains on them, too"
        )
    if config.data is not None and config.data.suffix == ".npz" and config.dataset != "npz":
        yield (
            f"{config.data.name} is read as {run.dataset.name}; data of your own needs "
            "--dataset npz and, where it is long-tailed, --imbalance-profile as-is"
        )
    if config.dataset == "folder" and config.data is not None and (config.data / "val").is_dir():
        share = f"{100 * config.held_out:g} %" if config.held_out else "none"
        yield f"{config.data.name}/val is not read: {share} of train is held out (--held-out)"
    yield from run.dataset.notes


def _attack(run: Run) -> Iterator[str]:
    config = run.config
    if config.attack == "free":
        yield (
            f"attack: free, along the gradient of training itself, {config.replays} updates on "
            "each batch; --start, --steps and --step-size do not act"
        )
    elif config.attack != "pgd":
        yield f"{_one_step(config, config.attack)}; --start, --steps and --step-size do not act"
    if config.attack_from and config.attack != EARLY_ATTACK:
        until = f"in the first {counted(config.attack_from, 'epoch')}, then {config.attack}"
        yield f"{_one_step(config, EARLY_ATTACK)} {until}"
    auto = config.fused and config.attack != "free" and config.attack_loss == "auto"
    if auto and resolve_attack_loss(config) == "ce":
        yield (
            "attack: plain cross-entropy; REAT's RBL weights cannot change an adversarial "
            "example while BatchNorm is in eval mode"
        )
    if kept := run.step.unfolded:
        shown = some(kept, 5)
        yield f"{len(kept)} BatchNorms follow no convolution, so the attack keeps them: {shown}"


def _one_step(config: Config, attack: AttackName) -> str:
    plan = plan_attack(attack, eps=config.eps, step_size=0.0, steps=1)
    scaled = ", both times the factor of each class" if config.radius == "class" else ""
    return (
        f"attack: {attack}, one step of {fraction_text(plan.step_size)} from even noise of "
        f"{fraction_text(plan.noise_scale)}{scaled}"
    )


def _schedule(run: Run) -> Iterator[str]:
    """Say what a run of another length comes to sooner or later, and what it never comes to."""
    config = run.config
    epochs = counted(config.epochs, "epoch")
    usual = PRESETS.get(run.plan.preset, Config())  # a run may be of a version that had another
    shares = in_proportion(usual, config.epochs)
    moved = [
        f"{flag(name)} {_shown(getattr(config, name))}"
        for name in SHARES
        if getattr(config, name) == getattr(shares, name) != getattr(usual, name)
        and acts(config, name)
    ]
    if moved:
        yield f"{epochs} in place of {usual.epochs}, so in proportion {' '.join(moved)}"
    beyond = [epoch for epoch in config.milestones if epoch >= config.epochs]
    if config.schedule == "multistep" and beyond:
        yield (
            f"--milestones {' '.join(map(str, beyond))}: never reached in {epochs}; "
            "the learning rate "
            + ("falls fewer times" if len(beyond) < len(config.milestones) else "does not fall")
        )
    if config.objective == "taet" and config.second_stage >= config.epochs:
        yield (
            f"--second-stage {config.second_stage}: never reached in {epochs}, which "
            "all train on clean images"
        )
    if config.attack_from >= config.epochs and config.attack != EARLY_ATTACK:
        yield (
            f"--attack-from {config.attack_from}: never reached in {epochs}, which "
            f"all train on examples of {EARLY_ATTACK}"
        )
    if config.awp and config.awp_from >= config.epochs:
        yield (
            f"--awp-from {config.awp_from}: never reached in {epochs}, in which no "
            "weights are perturbed"
        )


def _average(run: Run) -> Iterator[str]:
    """Say where a run ends before its average has the decay asked for, see WeightAverage."""
    ema, steps = run.config.ema, run.batches * run.config.epochs
    if ema and steps < 9 * ema / (1 - ema):
        yield (
            f"--ema {ema:g}: acts after {9 * ema / (1 - ema):,.0f} steps, this run has {steps:,}, "
            "in which each counts for more"
        )


def _idle(run: Run) -> Iterator[str]:
    for name, flags in idle_fields(run.config, run.plan.preset):
        shown = _shown(getattr(run.config, name))
        yield f"{flag(name)} {shown}: does nothing here; it goes with {flags}"


def _shown(value: object) -> str:
    """Write the value of a field as it is given on the command line."""
    listed = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in listed)


def _step(run: Run) -> Iterator[str]:
    how = "one CUDA graph" if run.replayed.captures else "eager"
    if run.config.fused and run.step.attack.network is not None:
        how += f", attack form {resolve_form(run.config, run.device)}"
    if run.step.update.form != "eager":
        how += f", {run.step.update.form} update"
    yield f"step: {_arithmetic(run)}, {how}; {run.loader_reason}"
    if run.config.precision == "tf32" and run.device.type == "cpu":
        yield "--precision tf32: a CPU has none, so the network computes in float32"
    if run.config.graph == "on" and not run.replayed.captures:
        yield f"--graph on: {run.device} has no CUDA graphs, so steps run eagerly"


def _arithmetic(run: Run) -> str:
    precision = resolve_precision(run.config, run.device)
    if precision != "bf16" or run.device.type != "cpu":
        return precision
    return "float32" if run.config.attack == "free" else "bf16 in the attack"  # see TrainStep


def _place(run: Run) -> str:
    """Name where a run computes: the GPU's name or the CPU's threads, and how many processes."""
    place = f"{torch.get_num_threads()} CPU threads"
    if run.device.type == "cuda":
        place = torch.cuda.get_device_name(run.device)
    return place if run.world.size == 1 else f"{run.world.size} x {place}"

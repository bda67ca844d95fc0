"""python -m reat_fast.evaluate RUN: accuracy under attack, overall, per class and on the tail."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from reat_fast import checkpoint
from reat_fast.cli.command import (
    choose_own_device,
    parse_flags,
    refused_once,
    run_command,
)
from reat_fast.config import Config
from reat_fast.data import ImageSet, load_run_data
from reat_fast.engine.distributed import FailedElsewhere, World
from reat_fast.engine.memory import keep_freed_memory
from reat_fast.engine.precision import refuse_missing_bfloat16, resolve_precision
from reat_fast.engine.stopping import ended_by_sigterm, exit_code
from reat_fast.evaluation import batches, guards
from reat_fast.evaluation.attacks import LINF_STEP, threat_text
from reat_fast.evaluation.attacks import Attack as Attack
from reat_fast.evaluation.measure import evaluate as evaluate
from reat_fast.evaluation.options import Options
from reat_fast.evaluation.saved import (
    EVALUATION,
    described,
    exported_of_other_images,
    images_sha256,
    known_epoch,
    refuse_other,
    write_as_named,
    write_beside_others,
)
from reat_fast.evaluation.search_state import SearchState
from reat_fast.evaluation.trial import Images
from reat_fast.evaluation.victim import attacked
from reat_fast.networks.architectures import Network
from reat_fast.reporting.tables import accuracy_table
from reat_fast.storage.config_file import from_json
from reat_fast.storage.whole_files import refuse_unwritable
from reat_fast.training import run_folder

GUARDED_IMAGES = 64
BAR = "{desc} {percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left at most"


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    world = World.from_environment()
    with refused_once(world):
        options = parse_flags(Options, arguments, "python -m reat_fast.evaluate")
        for name in options.attacks:
            Attack.from_name(name, 0.0)  # refused before anything is loaded
        weights = checkpoint.find_weights(options.run)
        folder = options.run if options.run.is_dir() else options.run.parent
        place = options.out or folder / EVALUATION
        if world.main:
            refuse_unwritable(place)
            if options.out is not None:
                refuse_other(options.out)
        device = choose_own_device(options.device, world)
    state = SearchState(place.parent)
    try:
        with world.joined(device), ended_by_sigterm():
            began = time.perf_counter()
            result, test_images = _evaluate_run(options, weights, folder, device, state, world)
            if world.main:
                _keep(options, result, folder, test_images, device, began)
            world.any(False)  # nothing to go on from is removed before the result is safe
            state.remove()
    except FailedElsewhere:
        return 1
    except KeyboardInterrupt as interrupt:
        go_on = "; the same command goes on with AutoAttack where it stands"
        if world.main:
            print(f"stopped{go_on if state.kept else ''}", file=sys.stderr)
        return exit_code(interrupt)
    return 0


def _keep(
    options: Options,
    result: dict[str, Any],
    folder: Path,
    test_images: int,
    device: torch.device,
    began: float,
) -> None:
    """Write what was found, and print it as a table."""
    result["seconds"] = round(time.perf_counter() - began, 3)
    if options.out is None:
        out, result = write_beside_others(folder, result)
    else:
        out = options.out
        result, aside = write_as_named(out, result)
        if aside is not None:
            print(f"{out} held another evaluation, which is now {aside}", file=sys.stderr)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    if not options.quiet:
        print(accuracy_table(result))
        print(_measured_on(result, folder, test_images))
        print(f"{out} written ({time.perf_counter() - began:.1f} s on {device})")


def _evaluate_run(
    options: Options,
    weights: Path,
    folder: Path,
    device: torch.device,
    state: SearchState,
    world: World,
) -> tuple[dict[str, Any], int]:
    """Measure what the options ask for.

    Returns what evaluation.json holds but the seconds, and the number of images of the test set.
    """
    if device.type == "cpu":
        keep_freed_memory()
    model, spec = checkpoint.load_model_and_spec(weights, device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    config = _config(folder)
    conditions = _conditions(options, config, device)
    if world.main:
        for idle in options.idle(config.eps):
            print(idle, file=sys.stderr)
    if config == Config() and spec.num_classes != 10 and not (options.dataset or options.data):
        raise ValueError(
            f"{weights}: was trained on {spec.num_classes} classes, of which data is not known; "
            "give --dataset and --data"
        )
    dataset = load_run_data(
        config, options.dataset, options.data, options.image_size, options.skip_bad
    )
    guards.refuse_other_data(dataset, spec, weights, "--dataset/--data")
    counts = _train_counts(options, folder, spec.num_classes)
    test = dataset.test if options.subset is None else dataset.test.evenly(options.subset)
    warnings, known = _guard(model, test, conditions["seed"]), images_sha256(test)
    result = _attacked(options, model, test, spec.num_classes, conditions, counts, state, world)
    warnings += guards.warnings_for_figures(result["attacks"])
    warnings += guards.warnings_for_classes(dataset.class_names, spec.class_names, counts)
    if options.data is None and exported_of_other_images(folder, known, len(test)):
        warnings.append(
            f"the figures that {folder} came with are of other test images; --data names those"
        )
    whole = described(result, conditions, weights, dataset, known, counts, warnings)
    return whole, len(dataset.test)


def _attacked(
    options: Options,
    model: Network,
    test: ImageSet,
    num_classes: int,
    conditions: dict[str, Any],
    counts: list[int] | None,
    state: SearchState,
    world: World,
) -> dict[str, Any]:
    """Return the figures of all attacks, with a bar on a terminal that counts forward passes."""
    eps, step_size, l2_eps = (conditions[name] for name in ("eps", "step_size", "l2_eps"))
    batch_size = options.batch_size
    if batch_size is None:
        height, width, channels = test.images.shape[1:]
        batch_size = batches.USUAL
        # Clean accuracy takes no gradient, whose kernels would be compiled for nothing.
        if any(name != "clean" for name in options.attacks):
            batch_size = batches.fitting(model, (channels, height, width), conditions["precision"])
    silent = options.quiet or not world.main
    hidden = silent or not sys.stderr.isatty()
    with tqdm(bar_format=BAR, leave=False, disable=hidden) as bar:
        return evaluate(
            model,
            test,
            [Attack.from_name(name, eps, step_size, l2_eps) for name in options.attacks],
            num_classes,
            eps=eps,
            seed=conditions["seed"],
            batch_size=batch_size,
            restarts=options.restarts,
            precision=conditions["precision"],
            train_counts=counts,
            state=state,
            bar=bar,
            say=(lambda text: None) if silent else partial(_say, world=world),
            world=world,
        )


def _conditions(options: Options, config: Config, device: torch.device) -> dict[str, Any]:
    """Return what the options say of the attacks, and the run where they are silent."""
    eps = config.eps if options.eps is None else options.eps
    precision = options.precision or resolve_precision(config, device)
    if precision == "tf32" and device.type == "cpu":
        print("--precision tf32: a CPU has none, so attacks search in float32", file=sys.stderr)
    if precision == "bf16":
        refuse_missing_bfloat16(device)
    return {
        "eps": eps,
        "step_size": LINF_STEP * eps if options.step_size is None else options.step_size,
        "l2_eps": options.l2_eps,
        "restarts": options.restarts,
        "precision": precision,
        "seed": config.seed if options.seed is None else options.seed,
        "device": str(device),
    }


def _say(text: str, *, world: World) -> None:
    share = "" if world.size == 1 else f" (of the share of the first of {world.size} processes)"
    tqdm.write(f"{text}{share}", file=sys.stderr)  # above the bar, where there is one


def _measured_on(result: dict[str, Any], folder: Path, test_images: int) -> str:
    epoch = known_epoch(folder, result["weights_sha256"])
    restarts = f", {result['restarts']} restarts" if result["restarts"] > 1 else ""
    return (
        f"{result['weights']}{'' if epoch is None else f' (epoch {epoch})'} on "
        f"{result['samples']:,} of {test_images:,} test images of {result['dataset']}, "
        f"{threat_text(result)}{restarts}"
    )


def _config(folder: Path) -> Config:
    file = folder / "config.json"
    return from_json(file.read_text("utf-8"), str(file)) if file.is_file() else Config()


def _train_counts(options: Options, folder: Path, num_classes: int) -> list[int] | None:
    counts = run_folder.train_counts(folder)
    if counts is not None and options.train_counts is not None:
        raise ValueError(f"--train-counts: {folder} has them; leave it out")
    if options.train_counts is not None:
        counts = list(options.train_counts)
        if len(counts) != num_classes or min(counts) < 0:
            raise ValueError(
                f"--train-counts: give one number of images for each of the {num_classes} classes, "
                f"got {len(counts)}"
            )
    elif counts is not None and (len(counts) != num_classes or min(counts) < 0):
        raise ValueError(
            f"{folder}: has {len(counts)} train_counts for the {num_classes} classes of the "
            "network; restore its split.json (in an export config.json)"
        )
    return counts


def _guard(model: Network, image_set: ImageSet, seed: int) -> list[str]:
    """Refuse what cannot be evaluated; return warnings."""
    few = image_set.evenly(GUARDED_IMAGES)
    labels = torch.from_numpy(few.labels)
    with attacked(model) as victim:
        images, _ = Images(few, victim, seed, 0.0)(torch.arange(len(few)))
        labels = labels.to(images.device)
        guards.refuse(model, images, labels)
        return guards.warnings_for_model(model, images, labels)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

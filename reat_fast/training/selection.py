"""Choosing the best epoch of a run, and testing the chosen weights once."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reat_fast import checkpoint
from reat_fast.config import Config
from reat_fast.data import ImageSet
from reat_fast.engine.precision import resolve_precision
from reat_fast.evaluation.attacks import L2_EPS, LINF_STEP, Attack
from reat_fast.evaluation.figures import SELECTION, STANDARD_ATTACKS
from reat_fast.evaluation.measure import evaluate
from reat_fast.evaluation.saved import described, images_sha256, write_at_the_end
from reat_fast.methods.work import WITH_GRADIENT, work_of_training
from reat_fast.networks.architectures import Network
from reat_fast.reporting.curves import draw_learning
from reat_fast.reporting.pictures import draw_accuracy
from reat_fast.sources.lazy import FileImages, find_damaged
from reat_fast.sources.lists import refuse_or_note
from reat_fast.training.gauge import seconds_per_step
from reat_fast.training.run import Run
from reat_fast.training.schedule import learning_rate

OFTENER = 5
"""How many times as many epochs are evaluated once the learning rate has fallen."""


Tick = Callable[[int], object]
"""Called with the number of images after each batch of an evaluation; may raise Stopped."""


def refuse_damaged(run: Run) -> None:
    """Decode the image files that evaluations read: a bad one would else end a run that is trained.

    With --skip-bad those that are left have been decoded.
    Errors: DataError naming what cannot be.
    """
    sets = [run.limited(run.splits.test)]
    if run.config.evaluation == "held-out":
        sets.append(_selection_set(run))
    for image_set in sets:
        if isinstance(image_set.images, FileImages) and not run.config.skip_bad:
            refuse_or_note(find_damaged(image_set.images), len(image_set), skip_bad=False)


def evaluation_is_due(run: Run, epoch: int) -> bool:
    """Say whether the weights after epoch number `epoch`, from 0 on, are evaluated."""
    config = run.config
    if config.evaluation == "none" or not len(_candidates(run)):
        return False
    return epoch + 1 == config.epochs or (epoch + 1) % _every(run, epoch) == 0


def evaluate_epoch(run: Run, epoch: int, tick: Tick | None = None) -> dict[str, Any]:
    """Evaluate the weights where it is due and keep them if they are the best so far.

    Returns the columns eval_clean, eval_robust and eval_robust_tail, empty where nothing was done.
    Errors: Stopped where a process was asked to stop.
    """
    if not evaluation_is_due(run, epoch):
        return {"eval_clean": "", "eval_robust": "", "eval_robust_tail": ""}
    config = run.config
    name, figure = SELECTION[config.evaluation]
    network = run.step.evaluated_network()
    result = _evaluated(run, network, _selection_set(run), ("clean", name), tick)["attacks"]
    robust, tail = result[name][figure], result[name]["tail"]
    found = {"epoch": epoch + 1, "robust": robust, "settled": is_settled(run, epoch)}
    if run.best is None or _rank(found) >= _rank(run.best):
        run.keep_best(found)
    return {
        "eval_clean": result["clean"][figure],
        "eval_robust": robust,
        "eval_robust_tail": "" if tail is None else tail,
    }


def is_settled(run: Run, epoch: int) -> bool:
    """Say whether epochs from this one on, counted from 0, go before all earlier ones.

    At its full learning rate a network swings by several points from epoch to epoch, on a held-out
    set whose rare classes have a handful of images, and the largest of many such figures is luck.
    Adversarial training is best soon after the first drop (Rice et al., ICML 2020), so an epoch
    counts once the learning rate of its last step is half its peak or less; with a constant one all
    are equals. The official choice on the test set stays what it is.
    """
    if run.config.evaluation == "official":
        return False
    return _settled(run.config, run.batches, run.lr_scale)[epoch]


@functools.lru_cache(maxsize=1)
def _settled(config: Config, batches: int, scale: float) -> list[bool]:
    peak, found = 0.0, []
    for epoch in range(config.epochs):
        rates = [learning_rate(config, epoch + batch / batches) for batch in range(batches)]
        peak = max(peak, *rates)
        found.append(rates[-1] * scale <= peak / 2 < peak)
    return found


def _rank(found: dict[str, float]) -> tuple[bool, float]:
    return bool(found.get("settled")), found["robust"]


def test(run: Run, tick: Tick | None = None) -> dict[str, Any]:
    """Evaluate the chosen weights on the test set, once; the main process writes what is found.

    Errors: Stopped where a process was asked to stop.
    """
    config, folder = run.config, run.folder
    best = config.select == "best" and run.best is not None
    weights = folder / (checkpoint.BEST if best else checkpoint.LAST)
    images = run.limited(run.splits.test)
    known = images_sha256(images) if run.world.main else ""
    began = time.perf_counter()
    result = _evaluated(run, _chosen(run, weights), images, STANDARD_ATTACKS, tick)
    if not run.world.main:
        return result
    conditions = {
        "eps": config.eps,
        "step_size": LINF_STEP * config.eps,
        "l2_eps": L2_EPS,
        "restarts": 1,
        "precision": resolve_precision(config, run.device),
        "seed": config.seed,
        "device": str(run.device),
    }
    result = described(result, conditions, weights, run.dataset, known, run.splits.counts)
    result["weights_epoch"] = int(run.best["epoch"]) if best and run.best else config.epochs
    result["seconds"] = round(time.perf_counter() - began, 3)
    result = write_at_the_end(folder, result)
    title = f"{run.dataset.name}, {config.model}, {run.plan.preset}, {weights.stem} weights"
    draw_accuracy(result, folder / "accuracy.png", title)
    draw_learning(folder / "metrics.csv", folder / "learning.png")
    return result


def _evaluated(
    run: Run, network: Network, images: ImageSet, attacks: Sequence[str], tick: Tick | None
) -> dict[str, Any]:
    """Attack a network on images, a share of them in each process."""
    return evaluate(
        network,
        images,
        _attacks(run, *attacks),
        run.dataset.num_classes,
        eps=run.config.eps,
        seed=run.config.seed,
        batch_size=run.config.eval_batch_size,
        # As in training: verdicts are in float32 anyway.
        precision=resolve_precision(run.config, run.device),
        train_counts=run.splits.counts,
        progress=tick,
        world=run.world,
    )


def _chosen(run: Run, weights: Path) -> Network:
    """Return the network with the weights in a file, which only the main process need see."""
    if run.world.main:
        model = checkpoint.load_model(weights, run.device)
    else:
        model = run.spec.build().to(run.device).eval()
    run.world.take_from_main_(model.state_dict().values())
    return model


def expected_seconds(run: Run) -> float:
    """Guess the seconds that are left from one attack step on a few images."""
    config = run.config
    per_epoch = min(run.batches * config.batch_size, len(run.splits.train))
    passes = per_epoch * work_of_training(config, run.epoch)
    passes += len(run.limited(run.splits.test)) * _passes(run, *STANDARD_ATTACKS)
    if config.evaluation != "none":
        name, _ = SELECTION[config.evaluation]
        evaluations = sum(evaluation_is_due(run, k) for k in range(run.epoch, config.epochs))
        passes += evaluations * len(_selection_set(run)) * _passes(run, "clean", name)
    if run.pace is None:
        run.pace = seconds_per_step(run)
    return passes / run.world.size / WITH_GRADIENT * run.pace


def _attacks(run: Run, *names: str) -> list[Attack]:
    return [Attack.from_name(name, run.config.eps) for name in names]


def _passes(run: Run, *names: str) -> int:
    """Return the forward passes that an image costs under attacks, one after the other."""
    return sum(attack.passes for attack in _attacks(run, *names))


def _every(run: Run, epoch: int) -> int:
    """Return how many epochs apart evaluations are: fewer where the best epoch is looked for."""
    config = run.config
    every = config.evaluated_every
    oftener = config.select == "best" and is_settled(run, epoch)
    return max(1, every // OFTENER) if oftener else every


def _candidates(run: Run) -> ImageSet:
    return run.splits.test if run.config.evaluation == "official" else run.splits.held_out


def _selection_set(run: Run) -> ImageSet:
    return run.limited(_candidates(run))

"""The accuracy of a model on a set, clean and under each attack, by one process or several."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import nn
from tqdm import tqdm

from reat_fast.cli.radius import fraction_text
from reat_fast.data import ImageSet
from reat_fast.engine.distributed import World
from reat_fast.engine.precision import Precision
from reat_fast.engine.stopping import Stopped
from reat_fast.evaluation import batches, guards
from reat_fast.evaluation.attacks import AUTOATTACKS, PACKAGED, Attack
from reat_fast.evaluation.captured import Ascents
from reat_fast.evaluation.search_state import SearchState
from reat_fast.evaluation.tally import Tally
from reat_fast.evaluation.trial import Images, Settings, Trial, Watch
from reat_fast.evaluation.victim import attacked
from reat_fast.networks.tracing import is_foreign


def evaluate(
    model: nn.Module,
    image_set: ImageSet,
    attacks: Sequence[Attack],
    num_classes: int,
    *,
    eps: float = 8 / 255,
    seed: int = 0,
    batch_size: int = 500,
    restarts: int = 1,
    precision: Precision = "float32",
    train_counts: Sequence[int] | None = None,
    state: SearchState | None = None,
    progress: Callable[[int], object] | None = None,
    bar: tqdm[Any] | None = None,
    say: Callable[[str], object] = lambda text: None,
    world: World | None = None,
) -> dict[str, Any]:
    """Measure the accuracy of a model on a set, clean and under each attack.

    Judged in true float32, without TF32. The random numbers of an image depend on (seed, its
    position) alone, so neither the batch size nor the choice of attacks changes a figure.
    restarts: of attacks with a random start; an image counts if it withstands them all.
    precision: in which attacks search. train_counts: training images per class, by which classes
    are head, body, tail and tail80.
    state: what AutoAttack goes on from, and keeps up to date. progress is called with the
    number of images after each batch and attack, and may raise Stopped, as all processes then do;
    bar counts forward passes; say gets a line after each attack of AutoAttack, which can take
    hours.
    The mode is left as found. On a GPU the steps of all attacks but AutoAttack are replayed from a
    CUDA graph, whose memory is free again at the end; where that fails, a warning says so.
    world: processes that share the images; each has to call this, and gets the figures of all.
    Returns {"samples": N, "per_class_samples": [C], "attacks": {name: figures}}; see figures. Of aa
    and l2aa also "after": the accuracy after each of its attacks.
    Errors: ValueError for AutoAttack on fewer than four classes, arguments that fit neither each
    other nor the images, and, of a network that is not of reat_fast.models, what guards.refuse
    finds, all before the first attack; FloatingPointError for logits that are NaN or infinite.
    """
    world, own, stopped = world or World(), None, Stopped(128 + signal.SIGTERM)
    settings = Settings(eps, seed, restarts, precision, batch_size)
    _refuse_misfits(model, settings, attacks, image_set, num_classes, train_counts)
    watch = Watch(state, progress, bar, say)
    try:
        own = share_tally(model, image_set, attacks, num_classes, settings, watch, world)
    except Stopped as error:
        stopped = error
    if world.any(own is None) or own is None:  # one that stops alone leaves the others waiting
        raise stopped
    return own.summed(world).result(train_counts)


def share_tally(
    model: nn.Module,
    image_set: ImageSet,
    attacks: Sequence[Attack],
    num_classes: int,
    settings: Settings,
    watch: Watch,
    world: World,
) -> Tally:
    """Attack the share of a set that this process has, every world.size-th image; no collective.

    Errors: those of evaluate; ValueError for AutoAttack on fewer images than processes, and for the
    package in several.
    """
    _refuse(image_set, attacks, num_classes, world)
    numbers = torch.arange(world.rank, len(image_set), world.size)
    labels = torch.from_numpy(image_set.labels)[numbers]
    tally = Tally(labels.bincount(minlength=num_classes))
    with (
        attacked(model, settings.precision, watch.bar, watch.say) as victim,
        Ascents(victim, batches.even(len(labels), settings.batch_size)) as ascents,
    ):
        images = Images(image_set, victim, settings.seed, settings.eps, numbers)
        if is_foreign(victim.model) and len(labels):
            few, _ = images(torch.arange(min(len(labels), guards.LOOKED_AT)))
            guards.refuse(victim.model, few, labels)
            victim.check(few)
        trial = Trial(victim, images, labels, settings, watch, ascents)
        for attack in attacks:
            right, after = trial.run(attack)
            tally.right[attack.name] = labels[right.cpu()].bincount(minlength=num_classes)
            if after:
                tally.after[attack.name] = after
            victim.refuse_nonfinite()
    return tally


def _refuse_misfits(
    model: nn.Module,
    settings: Settings,
    attacks: Sequence[Attack],
    image_set: ImageSet,
    num_classes: int,
    train_counts: Sequence[int] | None,
) -> None:
    """Raise ValueError for what would make figures of something else."""
    if not isinstance(image_set, ImageSet):
        kind = type(image_set).__name__
        raise ValueError(f"image_set: a {kind}; give reat_fast.data.ImageSet(images, labels)")
    if other := [attack for attack in attacks if not isinstance(attack, Attack)]:
        raise ValueError(f"attacks: {other[0]!r}; give Attack.from_name(name, eps) of each")
    names = [attack.name for attack in attacks]
    if len(set(names)) < len(names):
        raise ValueError(
            f"attacks: {', '.join(names)}; give each name once, others in another call"
        )
    if not 0 <= settings.eps <= 1:
        raise ValueError(f"eps: {settings.eps!r}; must be a radius on images in [0, 1]")
    for attack in attacks:
        if attack.eps is not None and not math.isclose(attack.eps, settings.eps, rel_tol=1e-6):
            raise ValueError(
                f"eps: {fraction_text(settings.eps)}, but {attack.name} was made for "
                f"{fraction_text(attack.eps)}; give Attack.from_name and evaluate the same"
            )
    if settings.precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise ValueError(f"precision: {settings.precision!r}; give one of {known}")
    for name in ("restarts", "batch_size"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: {getattr(settings, name)}; must be at least 1")
    if not len(image_set):
        raise ValueError("image_set: there are no images; give at least one")
    outputs = getattr(getattr(model, "fc", None), "out_features", num_classes)
    if outputs != num_classes:
        raise ValueError(f"num_classes: {num_classes}; the model has {outputs}")
    if int(image_set.labels.max()) >= num_classes or int(image_set.labels.min()) < 0:
        raise ValueError(f"image_set: a label is none of the {num_classes} classes")
    if train_counts is not None and len(train_counts) != num_classes:
        raise ValueError(f"train_counts: give one number for each of the {num_classes} classes")


def _refuse(image_set: ImageSet, attacks: Sequence[Attack], num_classes: int, world: World) -> None:
    """Raise ValueError for what an attack cannot do, before the first of them."""
    if any(attack.name in AUTOATTACKS for attack in attacks):
        guards.refuse_few_classes(num_classes)
        if len(image_set) < world.size:
            raise ValueError(
                f"--attacks: AutoAttack needs an image for each of the {world.size} processes, "
                f"the set has {len(image_set)}; start fewer"
            )
    packaged = [attack.name for attack in attacks if attack.name in PACKAGED]
    if world.size > 1 and packaged:
        # The random numbers of an image are those of its place in a batch.
        raise ValueError(f"--attacks: {packaged[0]} takes one process; start it without torchrun")

"""What a report asks the trained model: predictions, images and features under PGD-20.

The images are those that `python -m reat_fast.evaluate --subset N` takes, with the same random
starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reat_fast import checkpoint
from reat_fast.data import ImageSet, head_body_tail, load_run_data
from reat_fast.engine.precision import full_precision
from reat_fast.evaluation.attacks import LINF_STEP, Attack
from reat_fast.evaluation.guards import refuse_other_data
from reat_fast.evaluation.trial import Images
from reat_fast.evaluation.victim import attacked
from reat_fast.networks.architectures import Network
from reat_fast.reporting.run_record import RunRecord
from reat_fast.reporting.tables import attack_title

ATTACK = "pgd20"
EXAMPLES_PER_PART = 3
BATCH = 250

Points = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Probe:
    """Hold what a model did with N test images, clean and under attack.

    labels, clean_predictions, predictions (under attack) int64 [N], 0 the largest class. points and
    attacked_points [N, 2]: features on the two directions of largest variance of the clean ones, of
    which `explained` is the share of each. examples: positions of a few images of head and tail
    classes, shown in clean and attacked, float32 [K, H, W, C] in [0, 1].
    """

    labels: Labels
    clean_predictions: Labels
    predictions: Labels
    points: Points
    attacked_points: Points
    explained: tuple[float, float]
    examples: list[int]
    clean: Points
    attacked: Points
    eps: float
    conditions: str


def probe_run(
    run: RunRecord,
    images: int,
    data: Path | None,
    device: torch.device,
    skip_bad: bool = False,
) -> Probe:
    """Attack a run's model on `images` test images, evenly spread over the set.

    data: where the data is; None: where the run found it. skip_bad: leave out what cannot be
    decoded, also where the run does not. Weights are those that were evaluated, else those that
    load_model takes.
    Errors: ValueError naming the weights or the data that are missing or damaged.
    """
    told = run.evaluation or {}
    weights = run.folder / str(told.get("weights", ""))
    weights = weights if weights.is_file() else checkpoint.find_weights(run.folder)
    model, spec = checkpoint.load_model_and_spec(weights, device)
    dataset = load_run_data(run.config, path=data, skip_bad=skip_bad)
    refuse_other_data(dataset, spec, weights, "--data")
    eps = float(told.get("eps", run.config.eps))
    step_size = run.config.step_size if told else LINF_STEP * eps  # older evaluations lack theirs
    return probe(
        model,
        dataset.test.evenly(images),
        spec.num_classes,
        eps=eps,
        step_size=float(told.get("step_size", step_size)),
        seed=int(told.get("seed", run.config.seed)),
        order=run.order,
        source=f"{dataset.name}, {weights.name}",
    )


def probe(
    model: Network,
    image_set: ImageSet,
    num_classes: int,
    *,
    eps: float,
    step_size: float,
    seed: int,
    order: Sequence[int] | None = None,
    source: str = "",
) -> Probe:
    """Attack a model with PGD-20 in float32; source names data and weights. See Probe.

    order [C]: class numbers from the largest to the smallest; left out, 0 is the largest.
    """
    device, title = next(model.parameters()).device, attack_title(ATTACK)
    tensors = _attack(model, image_set, eps=eps, step_size=step_size, seed=seed)
    clean, attacked, features, logits, attacked_features, attacked_logits = tensors
    ranks = np.argsort(np.arange(num_classes) if order is None else np.array(order))
    labels, clean_predictions = ranks[image_set.labels], ranks[logits.argmax(1).numpy()]
    points, attacked_points, explained = principal_points(features, attacked_features)
    shown = choose_examples(labels, clean_predictions, num_classes)
    return Probe(
        labels=labels,
        clean_predictions=clean_predictions,
        predictions=ranks[attacked_logits.argmax(1).numpy()],
        points=points,
        attacked_points=attacked_points,
        explained=explained,
        examples=shown,
        clean=clean[shown].permute(0, 2, 3, 1).numpy(),
        attacked=attacked[shown].permute(0, 2, 3, 1).numpy(),
        eps=eps,
        conditions=f"{title}, {len(image_set):,} test images, {source}, {device.type}",
    )


def _attack(
    model: Network, image_set: ImageSet, *, eps: float, step_size: float, seed: int
) -> list[Tensor]:
    """Return, on the CPU, clean and attacked images, then features and logits of each."""
    pgd, labels, parts = Attack.from_name(ATTACK, eps, step_size), image_set.labels, []
    with attacked(model) as victim, full_precision():
        images = Images(image_set, victim, seed, eps)
        for rows in torch.arange(len(labels)).split(BATCH):
            clean, start = images(rows)
            own = torch.from_numpy(labels[rows.numpy()]).to(clean.device)
            adv = pgd.perturb(victim, clean, start, own, eps)
            parts.append((clean, adv, *_features(model, clean), *_features(model, adv)))
    return [torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True)]


@torch.no_grad()
def _features(model: Network, images: Tensor) -> tuple[Tensor, Tensor]:
    return model.forward_features_logits(images)


def principal_points(
    features: Tensor, others: Tensor
) -> tuple[Points, Points, tuple[float, float]]:
    """Project features [N, D] and others [M, D] on the first two principal directions of features.

    Returns both as [N, 2] and [M, 2], and the share of the variance that each direction holds. The
    largest component of a direction is positive, so that a picture does not flip between machines.
    """
    middle = features.double().mean(0)
    centred = features.double() - middle
    _, scales, directions = torch.linalg.svd(centred, full_matrices=False)
    directions, scales = directions[:2], scales.square()
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()
    share = (scales / scales.sum().clamp(min=1e-30)).tolist()
    points, other_points = (
        torch.nn.functional.pad(p, (0, 2 - p.shape[1])).float().numpy()
        for p in (centred @ directions.T, (others.double() - middle) @ directions.T)
    )
    return points, other_points, (share[0], share[1] if len(share) > 1 else 0.0)


def choose_examples(labels: Labels, clean_predictions: Labels, num_classes: int) -> list[int]:
    """Choose an image each of the largest head and the smallest tail classes.

    The first image of the class that the model gets right while it is clean, else the first.
    """
    parts, present = head_body_tail(num_classes), set(labels.tolist())
    head = [c for c in parts["head"] if c in present][:EXAMPLES_PER_PART]
    tail = [c for c in parts["tail"] if c in present][-EXAMPLES_PER_PART:]
    chosen = []
    for c in head + tail:
        members = np.flatnonzero(labels == c)
        right = members[clean_predictions[members] == c]
        chosen.append(int(right[0] if len(right) else members[0]))
    return chosen

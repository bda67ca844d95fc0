"""Guards against figures that mean nothing: wrong inputs, wrong mode, hidden or random gradients.

What makes an evaluation wrong is refused; what makes it doubtful is a warning. They follow the
checks of AutoAttack and RobustBench (arXiv 2010.09670), section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reat_fast.attack import cross_entropy
from reat_fast.data import Dataset
from reat_fast.evaluation.attacks import margin
from reat_fast.networks.borrowed import evaluating, first_tensor
from reat_fast.storage.weights_file import ModelSpec

LOOKED_AT = 16
"""Images of a set by which a model is judged."""
SQUARE_POINTS = 0.2
"""Square lowering the robust accuracy by more, in percentage points, is AutoAttack's own alarm."""


UNKNOWN_COUNTS = (
    "how many training images a class had is not known: head, body and tail are the first, middle "
    "and last classes; --train-counts tells"
)
"""A warning that no longer holds once an evaluation has been joined with one that knows them."""


class GuardError(ValueError):
    """A model or images that cannot be evaluated; the message is one line for the user."""


def refuse_other_data(dataset: Dataset, spec: ModelSpec, weights: Path, flags: str) -> None:
    """Refuse a data set whose classes or channels are not those that weights were trained on.

    flags: those that name a data set. Errors: GuardError.
    """
    for what, found, wanted in (
        ("classes", dataset.num_classes, spec.num_classes),
        ("channels", dataset.test.images.shape[-1], spec.in_channels),
    ):
        if found != wanted:
            raise GuardError(
                f"{flags}: {dataset.name} has {found} {what}, {weights} was trained on {wanted}; "
                "give data of as many"
            )
    names, own = list(dataset.class_names), list(spec.class_names)
    if names != own and sorted(names) == sorted(own):
        place = next(k for k, name in enumerate(names) if name != own[k])
        raise GuardError(
            f"{flags}: class {place} of {dataset.name} is {names[place]}, where {weights} was "
            f"trained on {own[place]}; give data with its classes in that order"
        )


def refuse_misfits(
    model: nn.Module, images: Tensor, labels: Tensor, eps: float, norm: str, batch_size: int
) -> None:
    """Raise ValueError for what would fail within a search, or give figures of something else."""
    if norm not in ("linf", "l2"):
        raise ValueError(f"norm: {norm!r}; give linf or l2")
    if not isinstance(eps, Real) or not 0 <= eps <= (1 if norm == "linf" else 1e4):
        usual = "8 / 255" if norm == "linf" else "128 / 255"
        raise ValueError(f"eps: {eps!r}; must be one radius on images in [0, 1], {usual} is usual")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size!r}; must be at least 1")
    wanted = first_tensor(model).dtype
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        given = f"{type(images).__name__} and {type(labels).__name__}"
        raise ValueError(f"images, labels: {given}; give torch tensors")
    if images.ndim != 4 or not len(images) or images.dtype != wanted:
        given = f"{images.dtype} of shape {list(images.shape)}"
        raise ValueError(f"images: {given}; give [N, C, H, W], one at least, as {wanted}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        given = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ValueError(f"labels: {given}; give int64, a class for each of {len(images)} images")
    low, high = float(images.detach().amin()), float(images.detach().amax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"images: pixels reach from {low:.3g} to {high:.3g}; give them in [0, 1]")


def refuse_few_classes(classes: int) -> None:
    """Raise ValueError for fewer than four classes, where the DLR loss is not defined."""
    if classes < 4:
        raise ValueError(
            f"--attacks: AutoAttack's targeted loss needs 4 classes, the model has {classes}; "
            "use pgd100 and cw100"
        )


def refuse(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Refuse what would make every figure wrong, judged on a batch.

    images [B, C, H, W], labels int64 [B]. Errors: GuardError for pixels outside [0, 1] or squeezed
    into a sliver of it, a module in train mode, outputs that are no tensor, logits that are NaN,
    infinite or probabilities, and labels beyond the classes, of which there may be more than
    images.
    """
    low, high = float(images.detach().amin()), float(images.detach().amax())
    if not (low >= 0 and high <= 1):
        raise GuardError(
            f"images: pixels reach from {low:.3g} to {high:.3g}, as bytes or normalised images do; "
            "give images in [0, 1] and normalise inside the model, or eps is another radius"
        )
    if high <= 2 / 255:
        raise GuardError(
            f"images: the brightest pixel is {high:.3g}, as if divided by 255 twice; eps would "
            "swallow them whole"
        )
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise GuardError(
            f"model: {training[0] or type(model).__name__} is in train mode, so images change each "
            "other's logits; call model.eval()"
        )
    with torch.no_grad():
        logits = model(images)
    if not isinstance(logits, Tensor):
        raise GuardError(f"model: gives a {type(logits).__name__}; it has to give logits alone")
    if not bool(logits.isfinite().all()):
        raise GuardError("model: some logits are NaN or infinite; check the weights")
    if bool((logits >= 0).all()) and bool(((logits.sum(1) - 1).abs() < 1e-5).all()):
        raise GuardError(
            "model: gives probabilities, whose gradients vanish; take the softmax off and give "
            "logits"
        )
    if int(labels.amin()) < 0 or int(labels.amax()) >= logits.shape[1]:
        raise GuardError(
            f"labels: reach from {int(labels.amin())} to {int(labels.amax())}, the model has "
            f"{logits.shape[1]} classes"
        )


def warnings_for_model(model: nn.Module, images: Tensor, labels: Tensor) -> list[str]:
    """Say what makes attacks on a model unreliable, judged on a batch: one line each.

    Logits that differ between two equal calls, and gradients of the margin or of the cross-entropy
    that are zero everywhere.
    """
    found = []
    with evaluating(model):
        with torch.no_grad():
            first, second = model(images), model(images)
        # A GPU may sum in another order each time: float32 rounding, far below 1e-4.
        if bool(((first - second).abs() > 1e-4 * first.abs().amax().clamp_min(1)).any()):
            found.append(
                "the model gives other logits for the same images: accuracies are one draw of a "
                "random defence, and attacks must average over its randomness"
            )
        for name, loss in (
            ("margin", lambda logits: margin(logits, labels).sum()),
            ("cross-entropy", lambda logits: cross_entropy(logits, labels)),
        ):
            zero = _zero_gradients(model, images, loss)
            if zero:
                found.append(
                    f"{zero} of {len(images)} images have no gradient of the {name} at all: "
                    "gradient attacks pass them by, so trust aa (its Square needs none)"
                )
    return found


def _zero_gradients(model: nn.Module, images: Tensor, loss: Any) -> int:
    leaf = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(model(leaf)), leaf)
    return int((gradient.flatten(1) == 0).all(1).sum())


def warnings_for_classes(
    names: Sequence[str], own: Sequence[str], train_counts: Sequence[int] | None
) -> list[str]:
    """Say where classes may not be those that were meant.

    names: of the data; own: those of the model, which official weights have not; train_counts: None
    where nothing tells.
    """
    found = []
    pairs = enumerate(zip(names, own, strict=False))
    other = next((place for place, (name, trained) in pairs if name != trained), None)
    if other is not None and not _are_numbers(names) and not _are_numbers(own):
        found.append(
            f"class {other} of this data is {names[other]}, the model was trained on {own[other]}: "
            "figures are right if that is another name of the same class"
        )
    if train_counts is None:
        found.append(UNKNOWN_COUNTS)
    return found


def _are_numbers(names: Sequence[str]) -> bool:
    """Say whether classes are named by their place, as those of an .npz file are."""
    return list(names) == [str(k) for k in range(len(names))]


def warnings_for_figures(attacks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Say which accuracies contradict each other; attacks: what evaluate returns under that name.

    One step that fools more than many steps, and Square finding what gradients did not, are signs
    of hidden gradients.
    """
    found = []
    overall = {name: result["overall"] for name, result in attacks.items()}
    iterated = {name: value for name, value in overall.items() if name.startswith("pgd")}
    for name, value in iterated.items():
        if "fgsm" in overall and value > overall["fgsm"] + 1:
            found.append(
                f"{name} leaves {value:.2f} % and fgsm {overall['fgsm']:.2f} %: one step fools "
                "more than many, a sign of hidden gradients; trust aa"
            )
    for name in ("aa", "l2aa"):
        after = attacks.get(name, {}).get("after", {})
        if after and after["fab-t"] - after["square"] > SQUARE_POINTS:
            lowered = f"from {after['fab-t']:.2f} % to {after['square']:.2f} %"
            found.append(
                f"Square lowered {name} {lowered}: it needs no gradients, so gradients may be "
                "hidden and the true figure lower still"
            )
    return found

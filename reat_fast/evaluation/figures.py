"""The figures of an evaluation, overall, on head, body and tail and per class, and its attacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reat_fast.sources.longtail import by_falling_size, head_body_tail

MAIN_ATTACK = "pgd20"
"""The attack that stands for robustness where a run was tested under it."""

STANDARD_ATTACKS = ("clean", MAIN_ATTACK)
"""What every run is tested under at its end."""

SELECTION = {"held-out": ("pgd10", "balanced"), "official": (MAIN_ATTACK, "overall")}
"""By --evaluation the attack and the figure that choose the best epoch."""


def figures(
    correct: Sequence[int], samples: Sequence[int], train_counts: Sequence[int] | None = None
) -> dict[str, Any]:
    """Turn right predictions and images per class into percentages.

    Returns overall, balanced (mean over classes), worst (class), head, body, tail (by train_counts,
    the tail as in REAT's code, see head_body_tail), tail80 (see tail_by_share; None without
    train_counts) and per_class [C] (None where a class has no image).
    """
    per_class = [100 * c / n if n else None for c, n in zip(correct, samples, strict=True)]
    present = [value for value in per_class if value is not None]
    return {
        "overall": 100 * sum(correct) / max(sum(samples), 1),
        "balanced": sum(present) / len(present) if present else None,
        "worst": min(present) if present else None,
        **parts(per_class, train_counts),
        "per_class": per_class,
    }


def parts(
    per_class: Sequence[float | None], train_counts: Sequence[int] | None = None
) -> dict[str, float | None]:
    """Return head, body, tail and tail80 of percentages per class; see figures."""

    def mean(classes: Sequence[int]) -> float | None:
        present = [value for c in classes if (value := per_class[c]) is not None]
        return sum(present) / len(present) if present else None

    thirds = head_body_tail(len(per_class), train_counts)
    return {
        **{part: mean(classes) for part, classes in thirds.items()},
        "tail80": mean(tail_by_share(train_counts)) if train_counts else None,
    }


def tail_by_share(train_counts: Sequence[int]) -> list[int]:
    """Return the classes beyond the largest ones that together hold 80 % of all images.

    train_counts: training images per class, in any order. The tail that RobustLT (CVPR 2026) looks
    at, read this way: classes by falling size, from the largest on until they hold so much; the
    others, which may be none, are the tail. Ascending.
    """
    order = by_falling_size(train_counts)
    held, wanted = 0.0, 0.8 * sum(train_counts)
    for place, c in enumerate(order):
        if held >= wanted:
            return sorted(order[place:])
        held += train_counts[c]
    return []


def largest_first(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return an evaluation whose classes go from the largest to the smallest, where that is known.

    So tables and pictures show them; those of a subset drawn here are in that order.
    """
    counts = evaluation.get("train_counts")
    if not counts:
        return evaluation
    order = by_falling_size(counts)
    turned = {
        name: [evaluation[name][c] for c in order]
        for name in ("class_names", "train_counts", "per_class_samples")
        if evaluation.get(name)
    }
    attacks = {
        name: {**figures, "per_class": [figures["per_class"][c] for c in order]}
        for name, figures in evaluation["attacks"].items()
    }
    return {**evaluation, **turned, "attacks": attacks}

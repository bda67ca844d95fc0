"""The pictures of the classes of a run: accuracy, predictions and weights of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reat_fast.data import head_body_tail
from reat_fast.evaluation.figures import largest_first
from reat_fast.objective import rbl_weights
from reat_fast.reporting.style import (
    FEW,
    INK,
    MUTED,
    NARROW,
    PART_COLOURS,
    WIDE,
    Floats,
    bars,
    new_figure,
    plain_numbers,
    short,
    style,
    whole_numbers,
    write_png,
)
from reat_fast.reporting.tables import attack_title, main_attack, part_of_class

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@style()
def draw_accuracy(evaluation: dict[str, Any], path: Path, title: str) -> None:
    """Draw accuracy per class, clean and under each attack, over the class sizes; write a PNG."""
    figure = class_accuracy(largest_first(evaluation))
    figure.suptitle(title, fontsize=9)
    write_png(path, figure)


@style()
def class_accuracy(evaluation: dict[str, Any]) -> Figure:
    """Draw accuracy per class over the class sizes, coloured by head, body and tail.

    Pale: clean; solid: the main attack (main_attack); markers: the others, where classes are few.
    """
    from matplotlib.patches import Patch

    counts, attacks = evaluation.get("train_counts"), evaluation["attacks"]
    figure = new_figure(WIDE, 4.2 if counts else 3.4)
    if counts:
        accuracies, sizes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        _draw_sizes(sizes, counts)
    else:
        accuracies = sizes = figure.subplots()
    main = main_attack(evaluation)
    parts = head_body_tail(len(evaluation["class_names"]))
    keys: list[Artist] = [
        Patch(color=PART_COLOURS[part], label=part) for part in parts if parts[part]
    ]
    for name, width, alpha in (("clean", 0.84, 0.32), (main, 0.5, 1.0)):
        if name in attacks:
            _draw_parts(accuracies, _heights(attacks[name]), width=width, alpha=alpha)
            label = f"{attack_title(name)}: {attacks[name]['overall']:.1f} overall"
            keys.append(Patch(color=MUTED, alpha=alpha, label=label))
    if len(evaluation["class_names"]) <= FEW:
        keys += _draw_others(
            accuracies, {n: attacks[n] for n in attacks if n not in ("clean", main)}
        )
    accuracies.set_title("accuracy in %")
    accuracies.set_ylim(0, 100)
    accuracies.tick_params(axis="x", length=0)
    figure.legend(handles=keys, loc="outside lower center", ncols=min(len(keys), 5))
    label_classes(sizes, evaluation["class_names"], WIDE)
    return figure


def _draw_others(axes: Axes, attacks: dict[str, Any]) -> list[Artist]:
    keys: list[Artist] = []
    for (name, figures), marker in zip(attacks.items(), "_x+.1234" * len(attacks), strict=False):
        label = f"{attack_title(name)}: {figures['overall']:.1f} overall"
        keys += axes.plot(_heights(figures), marker, color=INK, ms=5, lw=0, label=label)
    return keys


def _heights(figures: dict[str, Any]) -> Floats:
    return np.array([0.0 if value is None else value for value in figures["per_class"]])


def _draw_parts(axes: Axes, heights: Floats, **how: Any) -> None:
    for part, classes in head_body_tail(len(heights)).items():
        if classes:
            bars(axes, classes[0], heights[classes], PART_COLOURS[part], **how)


def _draw_sizes(axes: Axes, counts: Sequence[int]) -> None:
    _draw_parts(axes, np.array(counts, float), width=0.84)
    axes.set_yscale("log")
    # From a power of ten to one, so that at least two of them stand beside the bars.
    lowest = max(10 ** np.floor(np.log10(0.8 * max(min(counts), 1))), 0.5)
    axes.set_ylim(lowest, 10 ** np.ceil(np.log10(1.2 * max(counts))))
    plain_numbers(axes.yaxis)
    axes.set_title("training images, log scale")


def label_classes(axes: Axes, class_names: Sequence[str], width: float) -> None:
    """Name the classes along an x axis of `width` inches, or number them where they are many."""
    axes.set_xlim(-0.6, len(class_names) - 0.4)
    if len(class_names) <= FEW:
        names = [short(name) for name in class_names]
        fits = max(map(len, names)) * len(names) < 12 * width  # letters an inch
        turned: dict[str, Any] = (
            {} if fits else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        )
        axes.set_xticks(range(len(names)), names, **turned)
        axes.tick_params(axis="x", length=0)
    else:
        whole_numbers(axes.xaxis)
        axes.set_xlabel("class")


@style()
def prediction_histogram(
    counts: Sequence[int], ae_counts: Sequence[Sequence[int]], class_names: Sequence[str]
) -> Figure:
    """Draw, per epoch and class, the share of AE predictions over the share of training images.

    counts [C]; ae_counts [E, C]. A class that no AE was predicted as is at the end of the scale.
    """
    size = np.array(counts, float)
    predicted = np.array(ae_counts, float).T  # [C, E]
    share = predicted / np.maximum(predicted.sum(0), 1)
    with np.errstate(divide="ignore"):
        ratio = np.log2(share / np.maximum(size / size.sum(), 1e-12)[:, None])
    figure = new_figure(NARROW, 3.4)
    axes = figure.subplots()
    epochs = predicted.shape[1]
    image = axes.imshow(
        ratio.clip(-3, 3),
        cmap="PuOr",
        vmin=-3,
        vmax=3,
        aspect="auto",
        interpolation="none",
        extent=(0.5, epochs + 0.5, len(counts) - 0.5, -0.5),
    )
    bar = figure.colorbar(image, ax=axes, ticks=range(-3, 4), pad=0.02)
    bar.ax.set_yticklabels(["≤ ⅛", "¼", "½", "1", "2", "4", "≥ 8"])
    bar.outline.set_visible(False)
    axes.grid(False)
    axes.set_title("share of predictions over share of images")
    whole_numbers(axes.xaxis)
    axes.set_xlabel("epoch")
    name_rows(axes, class_names)
    return figure


def name_rows(axes: Axes, class_names: Sequence[str]) -> None:
    """Name the classes down the y axis, or number them where they are many."""
    if len(class_names) <= FEW:
        axes.set_yticks(range(len(class_names)), [short(name) for name in class_names])
        for text, part in zip(axes.get_yticklabels(), part_of_class(len(class_names)), strict=True):
            text.set_color(PART_COLOURS[part])
    else:
        whole_numbers(axes.yaxis)
        axes.set_ylabel("class")


@style()
def weight_chart(
    counts: Sequence[int], ae_counts: Sequence[Sequence[int]], class_names: Sequence[str]
) -> Figure:
    """Draw the RBL weight of each class before the first epoch and after the last.

    Hollow and solid dots or, where classes are many, a line and dots.
    """
    sizes = torch.tensor(counts)
    first, last = (rbl_weights(sizes, torch.tensor(a)).numpy() for a in (counts, ae_counts[-1]))
    figure = new_figure(NARROW, 3.4)
    axes = figure.subplots()
    for part, classes in head_body_tail(len(counts)).items():
        colour = PART_COLOURS[part]
        if len(counts) <= FEW:
            axes.vlines(classes, first[classes], last[classes], color=colour, lw=1.2, alpha=0.5)
            axes.plot(classes, first[classes], "o", mfc="none", mec=colour, ms=5)
            axes.plot(classes, last[classes], "o", color=colour, ms=5, label=part)
        else:
            axes.plot(classes, first[classes], color=colour)
            axes.plot(classes, last[classes], ".", color=colour, ms=2, label=part)
    axes.set_yscale("log")
    plain_numbers(axes.yaxis)
    before, after = ("hollow", "solid") if len(counts) <= FEW else ("line", "dots")
    axes.set_title(f"weight (mean 1); {before}: first, {after}: last")
    label_classes(axes, class_names, NARROW)
    axes.legend()
    return figure

"""The pictures of what a run has written down: learning, accuracy per class, statistics, time.

The names draw_learning and draw_accuracy write one PNG each; the other functions return figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from reat_fast.data import head_body_tail
from reat_fast.evaluation.figures import largest_first
from reat_fast.objective import rbl_weights
from reat_fast.reporting.data import read_metrics
from reat_fast.reporting.style import (
    FEW,
    INK,
    MUTED,
    NARROW,
    PART_COLOURS,
    SERIES,
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
from reat_fast.reporting.tables import attack_title, epoch_times, main_attack, part_of_class

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, float | None]]


@style()
def draw_accuracy(evaluation: dict[str, Any], path: Path, title: str) -> None:
    """Draw accuracy per class, clean and under each attack, over the class sizes; write a PNG."""
    figure = class_accuracy(largest_first(evaluation))
    figure.suptitle(title, fontsize=9)
    write_png(path, figure)


@style()
def draw_learning(metrics: Path, path: Path) -> None:
    """Draw loss and accuracies over epochs from metrics.csv; write a PNG."""
    rows, _ = read_metrics(metrics)
    figure = new_figure(WIDE, 3.4)
    losses, accuracies = figure.subplots(1, 2)
    _draw_losses(losses, rows)
    _draw_accuracies(accuracies, rows)
    write_png(path, figure)


@style()
def loss_curves(rows: Rows) -> Figure:
    """Draw the training loss and its terms over epochs."""
    figure = new_figure(NARROW, 2.9)
    _draw_losses(figure.subplots(), rows)
    return figure


@style()
def accuracy_curves(rows: Rows) -> Figure:
    """Draw accuracy on training AEs and at each evaluation over epochs."""
    figure = new_figure(NARROW, 2.9)
    _draw_accuracies(figure.subplots(), rows)
    return figure


def column(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Return epochs and values of a column, without the epochs that have none."""
    pairs = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    return [e for e, _ in pairs if e is not None], [v for _, v in pairs if v is not None]


TERMS = {
    "bsl": "balanced softmax",
    "tail": "tail penalty",
    "ce": "cross-entropy",
    "bce": "boosted cross-entropy",
    "margin": "cross-entropy with margin",
    "kl": "divergence",
    "equal": "equalisation of classes",
}
"""Columns of metrics.csv that add up to the loss, and their names on paper."""


def _draw_losses(axes: Axes, rows: Rows) -> None:
    terms = [(name, label) for name, label in TERMS.items() if name in rows[0]]
    drawn = [("loss", "whole loss", INK, "-")]
    for (name, label), colour, line in zip(terms, SERIES, ("--", ":"), strict=False):
        drawn.append((name, label, colour, line))
    for name, label, colour, line in drawn:
        axes.plot(*column(rows, name), line, color=colour, label=label, marker=_marker(rows))
    axes.set_title("training loss")
    _finish_epochs(axes)


def _draw_accuracies(axes: Axes, rows: Rows) -> None:
    drawn = [
        ("adv_accuracy", "training AEs", INK, "-", _marker(rows)),
        ("eval_clean", "evaluated, clean", SERIES[0], "--", "o"),
        ("eval_robust", "evaluated, robust", SERIES[1], "-", "s"),
        ("eval_robust_tail", "robust, tail classes", PART_COLOURS["tail"], ":", "^"),
    ]
    for name, label, colour, line, marker in drawn:
        epochs, values = column(rows, name)
        if epochs:
            axes.plot(epochs, values, line, color=colour, label=label, marker=marker, ms=3.5)
    axes.set_title("accuracy in %")
    axes.set_ylim(0, 100)
    _finish_epochs(axes)


def _marker(rows: Rows) -> str:
    return "." if len(rows) <= FEW else ""


def _finish_epochs(axes: Axes) -> None:
    whole_numbers(axes.xaxis)
    axes.set_xlabel("epoch")
    axes.legend()


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
    axes.set_ylim(0.8 * max(min(counts), 1), 1.6 * max(counts))
    plain_numbers(axes.yaxis)
    axes.set_title("training images")


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


@style()
def time_chart(timing: Rows) -> Figure:
    """Draw the seconds of each epoch by what they were spent on, and the throughput."""
    figure = new_figure(WIDE, 2.7)
    seconds, speed = figure.subplots(1, 2)
    spent = epoch_times(timing)
    bottom = np.zeros(len(spent))
    for name, colour in zip(spent[0], (SERIES[2], SERIES[0], SERIES[3]), strict=True):
        heights = np.array([row[name] for row in spent])
        bars(seconds, 1, heights, colour, bottom=bottom, width=0.8, label=name)
        bottom = bottom + heights
    seconds.set_title("seconds per epoch")
    speed.plot(*column(timing, "images_per_second"), color=INK, marker=_marker(timing))
    speed.set_ylim(0, 1.15 * max(column(timing, "images_per_second")[1]) or 1)
    speed.set_title("training images per second, mean so far")
    for axes in (seconds, speed):
        whole_numbers(axes.xaxis)
        axes.set_xlabel("epoch")
        axes.set_xlim(0.4, len(timing) + 0.6)
    seconds.set_ylim(0, 1.25 * max(bottom.max(), 1e-9))
    seconds.legend(ncols=3, loc="upper left")
    return figure

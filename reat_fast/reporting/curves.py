"""The pictures of a run over its epochs: loss, accuracies and time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from reat_fast.reporting.run_record import read_metrics
from reat_fast.reporting.style import (
    FEW,
    INK,
    NARROW,
    PART_COLOURS,
    SERIES,
    WIDE,
    bars,
    new_figure,
    style,
    whole_numbers,
    write_png,
)
from reat_fast.reporting.tables import epoch_times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[dict[str, float | None]]


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
    # A term that is always 0, as a penalty that is off, says nothing; one alone is the whole loss.
    terms = [(name, label) for name, label in TERMS.items() if any(column(rows, name)[1])]
    terms = terms if len(terms) > 1 else []
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
            # A marker on the edge, at 100 %, is drawn whole.
            (drawn_line,) = axes.plot(epochs, values, line, color=colour, label=label, ms=3.5)
            drawn_line.set(marker=marker, clip_on=False)
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
    speed.set_title("training images per second")
    for axes in (seconds, speed):
        whole_numbers(axes.xaxis)
        axes.set_xlabel("epoch")
        axes.set_xlim(0.4, len(timing) + 0.6)
    seconds.set_ylim(0, 1.25 * max(bottom.max(), 1e-9))
    seconds.legend(ncols=3, loc="upper left")
    return figure

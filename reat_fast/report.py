"""What a run shows a person: the table of accuracies and the pictures."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reat_fast.data import head_body_tail

PARTS = ("overall", "balanced", "head", "body", "tail", "worst")


def accuracy_table(evaluation: dict[str, Any]) -> str:
    """Write the figures of reat_fast.evaluate.evaluate as a table: overall, thirds, classes.

    evaluation: what evaluate returns with class_names and, where known, train_counts [C].
    """
    names = list(evaluation["attacks"])
    counts = evaluation.get("train_counts")
    class_names = evaluation["class_names"]
    part_of = {c: part for part, cs in head_body_tail(len(class_names)).items() for c in cs}
    rows: list[Sequence[str]] = [("accuracy in %", "", "images", *names)]
    for part in PARTS:
        values = [evaluation["attacks"][name][part] for name in names]
        rows.append((part, "", "", *map(_percent, values)))
    for c, class_name in enumerate(class_names):
        values = [evaluation["attacks"][name]["per_class"][c] for name in names]
        images = str(counts[c]) if counts else ""
        rows.append((f"  {class_name}", part_of[c], images, *map(_percent, values)))
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1 : 1 + len(PARTS)], rule, *lines[1 + len(PARTS) :]])


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def draw_accuracy(evaluation: dict[str, Any], path: Path, title: str) -> None:
    """Draw accuracy per class, clean and under each attack, over the class sizes; write a PNG."""
    from matplotlib.figure import Figure

    names = list(evaluation["attacks"])
    class_names = evaluation["class_names"]
    counts = evaluation.get("train_counts")
    classes = range(len(class_names))
    figure = Figure(figsize=(max(7.0, 0.16 * len(class_names) + 4.0), 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for k, name in enumerate(names):
        result = evaluation["attacks"][name]
        places = [c + (k - (len(names) - 1) / 2) * width for c in classes]
        heights = [value or 0.0 for value in result["per_class"]]
        figures = ", ".join(f"{part} {_percent(result[part])}" for part in ("overall", "tail"))
        axes.bar(places, heights, width, label=f"{name}: {figures}")
    axes.set_ylabel("accuracy in %")
    axes.set_ylim(0, 105)
    axes.set_xticks(list(classes), class_names, rotation=40 if len(class_names) <= 20 else 90)
    axes.tick_params(axis="x", labelsize=9 if len(class_names) <= 20 else 5)
    for part, members in head_body_tail(len(class_names)).items():
        if members:
            if part == "body":
                axes.axvspan(members[0] - 0.5, members[-1] + 0.5, color="0.94", lw=0, zorder=0)
            middle = (members[0] + members[-1]) / 2
            axes.text(middle, 101, part, ha="center", va="bottom", fontsize=9, color="0.35")
    if counts:
        sizes = axes.twinx()
        sizes.plot(list(classes), counts, "k.--", lw=0.8, label="training images")
        sizes.set_yscale("log")
        sizes.set_ylabel("training images")
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=130, format="png")


def draw_learning(metrics: Path, path: Path) -> None:
    """Draw loss and accuracies over epochs from metrics.csv; write a PNG."""
    from matplotlib.figure import Figure

    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for name in ("loss", "bsl", "tail"):
        losses.plot(epochs, [float(row[name]) for row in rows], label=name)
    losses.set_yscale("symlog", linthresh=1e-2)
    losses.set_ylabel("training loss")
    accuracies.plot(epochs, [float(row["adv_accuracy"]) for row in rows], label="training AEs")
    for column in (name for name in rows[0] if name.startswith("eval_")):
        shown = [(int(row["epoch"]), float(row[column])) for row in rows if row[column]]
        if shown:
            accuracies.plot(*zip(*shown, strict=True), "o-", label=f"evaluated: {column[5:]}")
    accuracies.set_ylabel("accuracy in %")
    for axes in (losses, accuracies):
        axes.set_xlabel("epoch")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130, format="png")

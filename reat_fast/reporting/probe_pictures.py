"""The pictures of what a model does under attack: confusion, images, features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from reat_fast.data import head_body_tail
from reat_fast.reporting.pictures import name_rows
from reat_fast.reporting.probe import Labels, Points, Probe
from reat_fast.reporting.style import (
    FEW,
    PART_COLOURS,
    WIDE,
    Floats,
    new_figure,
    short,
    style,
    whole_numbers,
)
from reat_fast.reporting.tables import part_of_class

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

MARKS = {"head": "o", "body": "s", "tail": "^"}


def confusion(labels: Labels, predictions: Labels, num_classes: int) -> Floats:
    """Return, in percent of each true class (row), what was predicted: [C, C].

    A class without an image is a row of NaN.
    """
    counted = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    matrix = counted.reshape(num_classes, num_classes).astype(np.float64)
    images = matrix.sum(1, keepdims=True)
    shares: Floats = np.full_like(matrix, np.nan)
    np.divide(100 * matrix, images, out=shares, where=images > 0)
    return shares


@style()
def confusion_maps(probe: Probe, class_names: Sequence[str]) -> Figure:
    """Draw what each class is taken for, clean and under attack, in percent of the class."""
    figure = new_figure(WIDE, 4.6)
    panels = figure.subplots(1, 2, sharey=True)
    classes, few = len(class_names), len(class_names) <= FEW
    drawn = ((probe.clean_predictions, "clean"), (probe.predictions, "under attack"))
    for axes, (predictions, title) in zip(panels, drawn, strict=True):
        shares = confusion(probe.labels, predictions, classes)
        image = axes.imshow(shares, cmap="cividis", vmin=0, vmax=100, interpolation="none")
        axes.grid(False)
        axes.set_title(title)
        axes.set_xlabel("predicted class")
        if few:
            places: dict[str, Any] = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
            axes.set_xticks(range(classes), [short(name) for name in class_names], **places)
            _write_shares(axes, shares)
        else:
            whole_numbers(axes.xaxis)
    name_rows(panels[0], class_names)
    panels[0].set_ylabel("true class")
    if not few:
        figure.colorbar(image, ax=panels, pad=0.01, fraction=0.03, label="% of the true class")
    return figure


def _write_shares(axes: Axes, shares: Floats) -> None:
    size = min(7.5, 75 / len(shares))
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.5:  # NaN and what would be written as 0 are left out
            colour = "#111820" if share > 55 else "#f4f6f8"
            place: Any = {"ha": "center", "va": "center"}
            axes.text(column, row, f"{share:.0f}", color=colour, fontsize=size, **place)


@style()
def example_grid(probe: Probe, class_names: Sequence[str]) -> Figure:
    """Draw images of head and tail classes: clean, attacked, and the difference, grey where none.

    The difference is scaled so that +eps is full brightness and -eps none.
    """
    columns = len(probe.examples)
    figure = new_figure(WIDE, WIDE / max(columns, 4) * 3 + 0.7)
    grid = figure.subplots(3, columns, squeeze=False)
    change = 0.5 + 0.5 * (probe.attacked - probe.clean) / max(probe.eps, 1e-12)
    rows = (probe.clean, probe.attacked, change.clip(0, 1))
    predicted = (probe.clean_predictions, probe.predictions)
    part_of = part_of_class(len(class_names))
    for k, position in enumerate(probe.examples):
        label = int(probe.labels[position])
        for row, images in enumerate(rows):
            axes = grid[row, k]
            _show(axes, images[k])
            if row < 2:
                guess = int(predicted[row][position])
                mark = "✓" if guess == label else "✗"
                axes.set_xlabel(f"{mark} {short(class_names[guess])}")
        colour = PART_COLOURS[part_of[label]]
        title = f"{part_of[label]}: {short(class_names[label])}"
        grid[0, k].set_title(title, color=colour, loc="center")
    for row, name in enumerate(("clean", "attacked", "perturbation")):
        grid[row, 0].set_ylabel(name)
    return figure


def _show(axes: Axes, image: Floats) -> None:
    grey = image.shape[2] == 1
    picture = image[..., 0] if grey else image
    axes.imshow(picture, cmap="gray" if grey else None, vmin=0, vmax=1, interpolation="none")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


@style()
def feature_map(probe: Probe, class_names: Sequence[str]) -> Figure:
    """Draw features in the plane of their largest variance, clean and attacked, by class.

    Colour runs from the largest class to the smallest; the mark is that of head, body or tail.
    """
    figure = new_figure(WIDE, 4.0)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    drawn = ((probe.points, "clean"), (probe.attacked_points, "under attack"))
    for axes, (points, title) in zip(panels, drawn, strict=True):
        _scatter(axes, points, probe.labels, class_names)
        axes.set_title(title)
        axes.grid(False)
        axes.set_xlabel(f"first direction, {100 * probe.explained[0]:.0f} % of the variance")
    panels[0].set_ylabel(f"second direction, {100 * probe.explained[1]:.0f} %")
    if len(class_names) <= FEW:
        keys, names = panels[0].get_legend_handles_labels()
        columns = 1 + len(names) // 16
        figure.legend(keys, names, loc="outside right upper", ncols=columns, markerscale=1.6)
    else:
        dots = panels[0].collections[0]
        largest_first = figure.colorbar(dots, ax=panels, pad=0.01, fraction=0.03)
        largest_first.set_label("class, largest to smallest")
        largest_first.ax.invert_yaxis()
        whole_numbers(largest_first.ax.yaxis)
    return figure


def _scatter(axes: Axes, points: Points, labels: Labels, class_names: Sequence[str]) -> None:
    classes = len(class_names)
    how: dict[str, Any] = {
        "cmap": _class_colours(),
        "vmin": 0,
        "vmax": max(classes - 1, 1),
        "s": 10,
        "lw": 0,
        "alpha": 0.85,
    }
    for part, members in head_body_tail(classes).items():
        # One by one where each is named, all at once where there are too many.
        for shown in [[c] for c in members] if classes <= FEW else [members]:
            chosen = np.isin(labels, shown)
            label = short(class_names[shown[0]]) if shown else part
            across, up = points[chosen].T
            axes.scatter(across, up, c=labels[chosen], marker=MARKS[part], label=label, **how)


def _class_colours() -> Colormap:
    """Return viridis without its ends, which vanish on black or on white."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(colormaps["viridis"](np.linspace(0.12, 0.92, 256)))

"""The pictures of runs side by side: one colour a group, one line a run, bands over seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reat_fast.data import head_body_tail
from reat_fast.reporting.curves import column
from reat_fast.reporting.groups import Group
from reat_fast.reporting.pictures import label_classes
from reat_fast.reporting.run_record import RunRecord
from reat_fast.reporting.style import (
    FEW,
    INK,
    NARROW,
    PART_COLOURS,
    SERIES,
    WIDE,
    Floats,
    legend_below,
    new_figure,
    style,
    whole_numbers,
)
from reat_fast.reporting.tables import attack_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (INK, *SERIES)
LINES = ("-", "--", ":", "-.")
ROOM = 6
"""Groups that are named beside their lines."""


def looks(index: int) -> tuple[str, str]:
    """Return colour and line of a group: a colour of its own, then colours with other lines."""
    return COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]


@style()
def compared_curves(groups: Sequence[Group], name: str, title: str) -> Figure | None:
    """Draw a column of metrics.csv over epochs, a line for each run; None where no run has it."""
    figure = new_figure(NARROW, 3.0)
    axes = figure.subplots()
    for k, group in enumerate(groups):
        colour, line = looks(k)
        label: str | None = group.legend
        for run in group.runs:
            epochs, values = column(run.metrics, name)
            if epochs:
                mark = "." if len(epochs) <= FEW else ""
                axes.plot(epochs, values, line, marker=mark, color=colour, label=label, alpha=0.8)
                label = None
    if not axes.lines:
        return None
    axes.set_title(title)
    axes.set_xlabel("epoch")
    whole_numbers(axes.xaxis)
    if "%" in title:
        axes.set_ylim(0, max(1.0, axes.get_ylim()[1]))
    if len(groups) > ROOM:
        legend_below(figure, axes)
    elif len(groups) > 1:
        axes.legend()
    return figure


ClassKey = tuple[str, int]
"""A class of any run: its name, and how many of that name the data set has before it."""


def class_keys(run: RunRecord) -> list[ClassKey]:
    """Return the classes of a run's evaluation as its figures go, from its largest class on."""
    names = (run.evaluation or {})["class_names"]
    keys, before = {}, Counter[str]()
    for at in sorted(range(len(names)), key=run.order.__getitem__):
        keys[at] = names[at], before[names[at]]
        before[names[at]] += 1
    return [keys[at] for at in range(len(names))]


def class_means(
    group: Group, attack: str, keys: Sequence[ClassKey]
) -> tuple[Floats, Floats] | None:
    """Return mean and sample standard deviation [C] per class over the seeds of a group.

    keys: classes in the order wanted. NaN where no run has an image of the class; deviation 0 with
    a single run. None where no run was evaluated under the attack.
    """
    rows = []
    for run in group.measured(attack):
        figures = (run.evaluation or {})["attacks"][attack]["per_class"]
        found = dict(zip(class_keys(run), figures, strict=True))
        rows.append([found[key] for key in keys])
    if not rows:
        return None
    values = np.array(rows, dtype=float)  # [runs, C]; None becomes NaN
    spread = values.std(0, ddof=1) if len(rows) > 1 else np.zeros(values.shape[1])
    return values.mean(0), spread


@style()
def compared_classes(groups: Sequence[Group], attack: str, keys: Sequence[ClassKey]) -> Figure:
    """Draw accuracy per class under an attack: mean and standard deviation of each group.

    keys: the classes, which all runs have, in the order shown. A single group has the colours of
    head, body and tail.
    """
    figure = new_figure(WIDE, 3.4)
    axes = figure.subplots()
    class_names = [name for name, _ in keys]
    found = [(group.legend, class_means(group, attack, keys)) for group in groups]
    shown = [(label, means) for label, means in found if means is not None]
    parts, few = head_body_tail(len(class_names)).items(), len(class_names) <= FEW
    for k, (label, (mean, spread)) in enumerate(shown):
        if len(shown) == 1:
            for part, classes in parts:
                how = {"color": PART_COLOURS[part], "label": part}
                _draw_means(axes, np.array(classes, int), mean[classes], spread[classes], how, few)
        else:
            colour, line = looks(k)
            aside = 0.3 * (k / (len(shown) - 1) - 0.5) if few else 0.0
            how = {"color": colour, "ls": line, "label": label}
            _draw_means(axes, np.arange(len(mean)) + aside, mean, spread, how, few)
    axes.set_title(f"{attack_title(attack)}: accuracy in %")
    axes.set_ylim(0, 100)
    label_classes(axes, class_names, WIDE)
    legend_below(figure, axes)
    return figure


def _draw_means(
    axes: Axes,
    places: npt.NDArray[Any],
    mean: Floats,
    spread: Floats,
    how: dict[str, Any],
    few: bool,
) -> None:
    if few:
        dots: Any = {"color": how["color"], "label": how["label"], "fmt": "o", "ms": 4.5, "lw": 1.2}
        # No further than an accuracy can be; the dots at 0 and 100 are drawn whole.
        reach = np.stack([np.minimum(spread, mean), np.minimum(spread, 100 - mean)])
        axes.errorbar(places, mean, reach, clip_on=False, **dots)
    else:
        axes.fill_between(places, mean - spread, mean + spread, color=how["color"], alpha=0.2, lw=0)
        axes.plot(places, mean, lw=1, **how)

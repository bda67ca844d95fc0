"""How pictures look, and how one drawing becomes a PNG for papers and an SVG for the page.

The SVG names its colours as CSS variables, so that it follows the light or dark theme of the page,
and leaves its text to the browser.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from reat_fast.storage.whole_files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

COLOURS = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#66707c", "#9aa4b0"),
    "line": ("#d5dae0", "#363d47"),
    "head": ("#1f5fa8", "#69a8f5"),
    "body": ("#c08a12", "#e2b84c"),
    "tail": ("#b3325c", "#ff7d9c"),
    "series-1": ("#16806a", "#4fc3a8"),
    "series-2": ("#7a4fb0", "#b795f0"),
    "series-3": ("#c2541b", "#f39a63"),
    "series-4": ("#50708f", "#9dbbd8"),
}
"""Light and dark colour of each CSS variable. Head, body and tail differ in hue and in lightness,
blue, yellow and red, which every kind of colour blindness keeps apart."""

INK, MUTED, LINE = (COLOURS[name][0] for name in ("ink", "muted", "line"))
PART_COLOURS = {part: COLOURS[part][0] for part in ("head", "body", "tail")}
SERIES = tuple(light for name, (light, _) in COLOURS.items() if name.startswith("series"))

WIDE, NARROW = 9.2, 4.6
"""Inches: a picture as wide as the page, and one of two beside each other."""

FEW = 30
"""Classes or epochs up to which each has a bar, a name or a number of its own."""

SHORT = 16
"""Letters of a class name in a picture."""

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "font.size": 8.5,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",
    "text.color": INK,
    # A class may be called $x$: names are shown, not typeset.
    "text.parse_math": False,
    "xtick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.color": MUTED,
    "ytick.labelsize": 8,
}


@dataclass(frozen=True)
class Picture:
    """A drawing with its file name (no suffix), heading, caption, and description in words."""

    name: str
    title: str
    caption: str
    description: str
    figure: Figure

    @property
    def wide(self) -> bool:
        """Whether the picture takes the width of the page."""
        return bool(self.figure.get_figwidth() > NARROW)


@contextmanager
def style() -> Iterator[None]:
    """Draw in the style of the report inside the block, or as a decorator inside the function."""
    import matplotlib

    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # Of letters that the drawing's own font lacks, which a browser has, and of room that is
        # scarce: whoever reads the terminal can change neither.
        for said in ("Glyph .* missing from", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", said, UserWarning)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def legend_below(figure: Figure, axes: Axes) -> None:
    """Name what is drawn below the axes; the figure grows, so that these stay as large."""
    handles, labels = axes.get_legend_handles_labels()
    letters = 16 * figure.get_figwidth()  # of a legend, side by side
    columns = max(1, min(len(labels), int(letters / (max(map(len, labels)) + 8))))
    further_rows = math.ceil(len(labels) / columns) - 1
    figure.set_figheight(figure.get_figheight() + 0.18 * further_rows)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def short(name: str) -> str:
    """Cut the name of a class to what fits beside an axis."""
    return name if len(name) <= SHORT else name[: SHORT - 1] + "…"


EACH_DECADE = 5
"""Decades that a logarithmic axis has room to label each of."""


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers: at powers of ten, within two of them more."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    def plain(value: float, _: object) -> str:
        return f"{value:,.0f}" if value >= 10 else f"{value:,.12f}".rstrip("0").rstrip(".")

    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 2.0
    if decades <= EACH_DECADE:
        subs = (1,) if decades >= 2 else (1, 2, 5) if decades > 0.5 else range(1, 10)
        axis.set_major_locator(LogLocator(subs=subs, numticks=2 * EACH_DECADE))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_locator(NullLocator())


def whole_numbers(axis: Any) -> None:
    """Put ticks of an axis at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def bars(axes: Axes, first: int, heights: Floats, colour: str, **how: Any) -> None:
    """Draw bars at first, first + 1, ...: no gaps, as one area of steps, where they are many.

    how: width, alpha, label and bottom, a number or [len(heights)].
    """
    if len(heights) <= FEW:
        axes.bar(range(first, first + len(heights)), heights, color=colour, **how)
        return
    bottom = np.broadcast_to(how.pop("bottom", 0.0), len(heights))
    how.pop("width", None)
    edges = first - 0.5 + np.arange(len(heights) + 1)
    lower, upper = (np.append(line, line[-1]) for line in (bottom, bottom + heights))
    axes.fill_between(edges, lower, upper, step="post", color=colour, lw=0, **how)


@style()
def write_png(path: Path, figure: Figure) -> None:
    """Write a figure as PNG on white, 200 dots an inch, atomically."""

    def save(partial: Path) -> None:
        figure.savefig(partial, format="png", dpi=200, facecolor="white")

    write_atomically(path, save)


@style()
def svg(picture: Picture) -> str:
    """Return a picture as an SVG element for a page whose CSS defines COLOURS as variables."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": picture.name}):
        picture.figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # What was laid out once stays so: laying out takes most of the time of drawing.
    picture.figure.set_layout_engine("none")
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    label = html.escape(picture.description)
    text = re.sub(r' (width|height|version)="[^"]*"', "", text, count=3)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return re.sub("<[^>]*>", lambda tag: _adopt(tag[0], picture.name), text)


def _adopt(tag: str, name: str) -> str:
    """Give a tag identifiers that no other picture has, and colours by variable."""
    tag = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", tag)
    for variable, (light, _) in COLOURS.items():
        tag = tag.replace(light, f"var(--{variable})")
    return tag

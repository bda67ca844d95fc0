"""The tables of a report: accuracies of a run, of runs side by side, and where the time went."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from reat_fast.evaluation.figures import MAIN_ATTACK, largest_first
from reat_fast.reporting.groups import Group
from reat_fast.reporting.run_record import PARTS, TAIL80
from reat_fast.sources.longtail import head_body_tail

Table = list[list[str]]
"""A heading and rows of equal length, as text."""

OF_WORDS = ("group", "preset", "attack", "part")
"""Columns of a Markdown table that hold words; the others hold numbers."""

MOST_CLASSES = 100
"""Classes that a printed table has rows for; JSON and report have all of them."""


def accuracy_table(evaluation: dict[str, Any]) -> str:
    """Write the figures of evaluation.measure.evaluate as a table: overall, parts, classes.

    evaluation: what evaluate returns with class_names and, where known, train_counts [C]. More than
    MOST_CLASSES classes have no rows of their own.
    """
    evaluation = largest_first(evaluation)
    names = list(evaluation["attacks"])
    counts = evaluation.get("train_counts")
    class_names = evaluation["class_names"]
    part_of = part_of_class(len(class_names))
    parts = _parts(evaluation["attacks"].values())
    rows: list[Sequence[str]] = [("accuracy in %", "", "trained on", *names)]
    for part in parts:
        values = [evaluation["attacks"][name][part] for name in names]
        rows.append((part, "", "", *map(_percent, values)))
    shown = class_names if len(class_names) <= MOST_CLASSES else []
    for c, class_name in enumerate(shown):
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
    return "\n".join([lines[0], rule, *lines[1 : 1 + len(parts)], rule, *lines[1 + len(parts) :]])


def _parts(attacks: Iterable[dict[str, Any]]) -> list[str]:
    known = any(figures.get(TAIL80) is not None for figures in attacks)
    return [*PARTS, *([TAIL80] if known else [])]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def part_of_class(num_classes: int) -> list[str]:
    """Say of each class, the largest first, whether it is head, body or tail."""
    part_of = [""] * num_classes
    for part, classes in head_body_tail(num_classes).items():
        for c in classes:
            part_of[c] = part
    return part_of


def sizes_of_parts(num_classes: int) -> str:
    """Count the classes of head, body and tail: of 6 they are 2, 3 and 1, and no thirds."""
    head, body, tail = map(len, head_body_tail(num_classes).values())
    return f"{head}, {body} and {tail}"


def parts_note(classes: Iterable[int]) -> str:
    """Say what head, body and tail are among these numbers of classes, "" where none is known."""
    told = [f"the {sizes_of_parts(n)} of {n} classes" for n in dict.fromkeys(classes) if n]
    if not told:
        return ""
    return (
        f"Head, body and tail are {' or '.join(told)} with the most to the fewest training images, "
        "the tail as in REAT's code; tail80, where it stands, the classes beyond the largest ones "
        "that hold 80 % of the images."
    )


def attack_title(name: str) -> str:
    """Write an attack's name as papers do: pgd20 is PGD-20, l2pgd20 L2 PGD-20, aa AutoAttack."""
    known = {"clean": "Clean", "aa": "AutoAttack", "aa-package": "pyautoattack"}
    if name.removeprefix("l2") in known:
        return f"{'L2 ' * name.startswith('l2')}{known[name.removeprefix('l2')]}"
    return re.sub(
        r"^(L2)?([A-Z]+)(\d+)$", lambda m: f"{'L2 ' if m[1] else ''}{m[2]}-{m[3]}", name.upper()
    )


def main_attack(evaluation: dict[str, Any]) -> str:
    """Choose the attack that stands for robustness: PGD-20, else the last, clean if alone.

    One in L2 does only where there is no other: it is not what the model was trained for.
    """
    names = sorted(evaluation["attacks"], key=lambda name: (name != "clean", name[:2] != "l2"))
    return MAIN_ATTACK if MAIN_ATTACK in names else names[-1]


def mean_text(values: Sequence[float | None], digits: int = 2) -> str:
    """Write the mean and, over two or more values, the sample standard deviation."""
    present = [value for value in values if value is not None]
    if not present:
        return "–"
    mean = f"{statistics.fmean(present):.{digits}f}"
    return mean if len(present) == 1 else f"{mean} ± {statistics.stdev(present):.{digits}f}"


def paper_table(groups: Sequence[Group]) -> Table:
    """Lay out accuracies in %: a row per group and attack, a column per part.

    The preset has a column where any run names one.

    Cells hold the mean and the sample standard deviation over the runs of the group.
    """
    several, named = len(groups) > 1, any(group.preset for group in groups)
    evaluations = [run.evaluation for group in groups for run in group.runs if run.evaluation]
    parts = _parts(figures for told in evaluations for figures in told["attacks"].values())
    first = [*(["group"] if several else []), *(["preset"] if named else []), "attack"]
    rows: Table = [[*first, *parts, "runs"]]
    for group in groups:
        for attack in group.attack_names():
            cells = [mean_text(group.values(attack, part)) for part in parts]
            head = [
                *([group.short_label] if several else []),
                *([group.preset or "–"] if named else []),
            ]
            rows.append(
                [*head, attack_title(attack), *cells, str(len(group.values(attack, "overall")))]
            )
    return rows


def word_columns(table: Table) -> int:
    """Count the columns of a table that hold words, which come first."""
    return sum(name in OF_WORDS for name in table[0])


def markdown(table: Table) -> str:
    """Write a table as Markdown; what a cell holds is shown, never interpreted."""
    heading, *rows = [[markdown_text(cell) for cell in row] for row in table]
    rule = [":--" if name in OF_WORDS else "--:" for name in table[0]]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, rule, *rows))


def markdown_text(text: str) -> str:
    """Write a text so that Markdown and HTML show it on one line and do not obey it."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\|*_`\[\]])", r"\\\1", escaped)


def time_split(timing: Sequence[dict[str, float | None]]) -> dict[str, float]:
    """Say where the seconds of a run went: warm-up, training, evaluation and saving.

    timing: rows of timing.csv. Each row repeats the warm-up of its process, which was spent in
    that process's first epoch, once.
    """
    split = {"warm-up": 0.0, "training": 0.0, "evaluation and saving": 0.0}
    for row in epoch_times(timing):
        for name, seconds in row.items():
            split[name] += seconds
    return split


def epoch_times(timing: Sequence[dict[str, float | None]]) -> list[dict[str, float]]:
    """Split the seconds of each epoch; see time_split."""
    rows, before = [], None
    for row in timing:
        warm_up = row["warm_up_seconds"] or 0.0
        first, before = warm_up != before, warm_up
        spent = {"warm-up": warm_up if first else 0.0, "training": row["training_seconds"] or 0.0}
        rest = (row["seconds"] or 0.0) - sum(spent.values())
        rows.append({**spent, "evaluation and saving": max(rest, 0.0)})
    return rows

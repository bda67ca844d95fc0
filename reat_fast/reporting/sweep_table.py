"""The table of a sweep: mean and sample standard deviation over the seeds of each line.

A figure enters with its attack and the protocol of its evaluation, as in a report; runs that differ
in these are not averaged. Seconds are those of all epochs, evaluations on held-out images included.
"""

from __future__ import annotations

import csv
import io
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reat_fast.cli.radius import fraction_text
from reat_fast.evaluation.attacks import threat_text
from reat_fast.reporting.groups import PROTOCOL, protocol_of, setting_text
from reat_fast.reporting.tables import attack_title, markdown_text, mean_text
from reat_fast.storage.json_object import read_object

ORIGINS = ("device", "torch", "commit")
"""What a row of summary.csv tells of where its runs come from, each value once."""


@dataclass(frozen=True)
class Planned:
    """A line of a sweep: its seeds, and the words of the training with the first of them."""

    name: str
    seeds: tuple[int, ...]
    words: Sequence[str]

    @property
    def command(self) -> str:
        """The whole command with the first seed, as a shell takes it."""
        return shlex.join(["python", "-m", "reat_fast.train", *self.words])

    @property
    def seeds_text(self) -> str:
        """All seeds, parted by spaces."""
        return " ".join(map(str, self.seeds))


@dataclass(frozen=True)
class SummaryRow:
    """The finished runs of one line: their conditions and, by column, a value for each.

    uneven: whether the classes that they were tested on differ in their images.
    """

    planned: Planned
    uneven: bool
    attacks: tuple[str, ...]
    conditions: dict[str, Any]
    values: dict[str, list[float]]
    origins: dict[str, set[str]]

    @property
    def finished(self) -> int:
        """Runs that the row is made of."""
        return len(self.values["seconds"])


def summarise(planned: Planned, files: Sequence[Path], attacks: Sequence[str]) -> SummaryRow:
    """Gather the figures of a line's runs from an evaluation of each and the timing.csv beside it.

    files: of the runs that are finished, of the planned ones. attacks: names in the evaluations;
    each has three columns in percent: overall, balanced and on the tail.
    Errors: ValueError naming a damaged file, and a run evaluated under other conditions.
    """
    conditions: dict[str, Any] = {}
    uneven = False
    columns = _columns(attacks)
    values: dict[str, list[float]] = {column: [] for column in (*columns, "seconds")}
    origins: dict[str, set[str]] = {name: set() for name in ORIGINS}
    for file in files:
        folder = file.parent
        try:
            evaluation = read_object(file)
            found = protocol_of(evaluation)
            uneven |= len(set(evaluation.get("per_class_samples") or ())) > 1
            for column, (attack, part) in columns.items():
                value = evaluation["attacks"].get(attack, {}).get(part)
                if value is not None:
                    values[column].append(float(value))
            values["seconds"].append(_seconds(folder / "timing.csv"))
            for origin, told in _origin(folder / "env.json", evaluation).items():
                origins[origin].add(told)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}: damaged or not an evaluation ({error})") from None
        if conditions not in ({}, found):
            name = next(name for name in PROTOCOL if found[name] != conditions[name])
            here, there = (setting_text(name, told[name]) for told in (found, conditions))
            raise ValueError(
                f"{file}: evaluated with {name} {here}, the other seeds with {there}; "
                "evaluate it again"
            )
        conditions = found
    return SummaryRow(planned, uneven, tuple(attacks), conditions, values, origins)


def _columns(attacks: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Name each column and the attack and part of evaluation.json behind it."""
    columns: dict[str, tuple[str, str]] = {}
    for attack in attacks:
        title = attack if attack == "clean" else attack_title(attack)
        columns[title] = attack, "overall"
        columns |= {f"{title} {part}": (attack, part) for part in ("balanced", "tail")}
    return columns


def _seconds(timing: Path) -> float:
    with timing.open(newline="", encoding="utf-8") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file))


def _origin(file: Path, evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Name the device, the torch and the commit of a run, by the env.json in its folder."""
    if not file.is_file():
        return {}
    facts = read_object(file)
    device = f"{facts['cpu']} {facts['cpu_cores']} cores"
    if str(evaluation.get("device")).startswith("cuda") and facts["gpus"]:
        device = facts["gpus"][0]["name"]
    return {"device": device, "torch": str(facts["torch"]), "commit": str(facts["commit"])}


def markdown(rows: Sequence[SummaryRow]) -> str:
    """Write the rows as a Markdown table whose columns also line up in a terminal.

    Where all classes have the same number of test images, balanced accuracy is the overall one.
    """
    columns = list(_columns(rows[0].attacks))
    if not any(row.uneven for row in rows):
        columns = [column for column in columns if not column.endswith(" balanced")]
    head = ["run", "seeds", "data set", "test images", "eps", *columns, "seconds"]
    cells = [head]
    for row in rows:
        eps = row.conditions.get("eps")
        radius = "–" if eps is None else fraction_text(eps)
        if eps is not None and any(attack.startswith("l2") for attack in row.attacks):
            radius += f"; {threat_text(row.conditions, 'l2')}"
        cells.append(
            [
                row.planned.name,
                f"{row.finished} of {len(row.planned.seeds)}",
                markdown_text(str(row.conditions.get("dataset", "–"))),
                str(row.conditions.get("samples", "–")),
                radius,
                *(_cell(row, column) for column in columns),
                mean_text(row.values["seconds"], digits=0),
            ]
        )
    widths = [max(len(line[k]) for line in cells) for k in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |"
        for line in cells
    )


def _cell(row: SummaryRow, column: str) -> str:
    values = row.values[column]
    missing = values and len(values) < row.finished
    return mean_text(values) + (f" (n = {len(values)})" if missing else "")


def document(rows: Sequence[SummaryRow]) -> str:
    """Write summary.md: the table, what its figures are, and the command behind each row."""
    planned = [row.planned for row in rows]
    first = ", with the first of its seeds" * any(len(one.seeds) > 1 for one in planned)
    listed = "\n".join(
        f"    # {one.name}, seed{'s' * (len(one.seeds) > 1)} {one.seeds_text}\n    {one.command}"
        for one in planned
    )
    uneven = any(row.uneven for row in rows)
    balanced = (
        " Classes differ in their test images: an attack's first column counts every image alike, "
        "balanced every class."
    )
    return (
        f"{markdown(rows)}\n\nAccuracies in percent on the test set, mean ± sample standard "
        f"deviation over the seeds; seconds of all epochs.{balanced * uneven}\n\n"
        f"The command of each row{first}:\n\n{listed}\n"
    )


def comma_separated(rows: Sequence[SummaryRow]) -> str:
    """Write summary.csv: means and sample standard deviations, empty where there are none.

    seeds: those of the line, as many as are planned; command: that of the first of them.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [*_columns(rows[0].attacks), "seconds"]
    names = [column.lower().replace("-", "").replace(" ", "_") for column in columns]
    figures = [f"{name}_{kind}" for name in names for kind in ("mean", "std")]
    runs = ["run", "command", "seeds", "finished", "planned"]
    writer.writerow([*runs, *PROTOCOL, *figures, *ORIGINS])
    for row in rows:
        figure: list[float | str] = []
        for column in columns:
            values = row.values[column]
            figure.append(statistics.fmean(values) if values else "")
            figure.append(statistics.stdev(values) if len(values) > 1 else "")
        conditions = [row.conditions.get(condition, "") for condition in PROTOCOL]
        origins = ["; ".join(sorted(row.origins[name])) for name in ORIGINS]
        line, seeds = row.planned, len(row.planned.seeds)
        told = [line.name, line.command, line.seeds_text, row.finished, seeds]
        writer.writerow([*told, *conditions, *figure, *origins])
    return text.getvalue()

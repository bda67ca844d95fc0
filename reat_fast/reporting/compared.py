"""The page of several runs side by side: means and spread over seeds, group by group."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from reat_fast.cli.terminal import counted, duration
from reat_fast.evaluation.figures import STANDARD_ATTACKS
from reat_fast.reporting import markup
from reat_fast.reporting.compared_pictures import class_keys, compared_classes, compared_curves
from reat_fast.reporting.groups import Group, group_runs
from reat_fast.reporting.pages import Report
from reat_fast.reporting.run_record import RunRecord
from reat_fast.reporting.style import Picture
from reat_fast.reporting.tables import (
    Table,
    attack_title,
    markdown_text,
    mean_text,
    paper_table,
    parts_note,
    time_split,
    word_columns,
)

SPREAD = (
    "Mean ± sample standard deviation over the runs of a group, which differ in the seed alone."
)


def compared_report(runs: Sequence[RunRecord]) -> Report:
    """Write the report of several runs.

    Errors: ValueError where a run is named twice.
    """
    names = [str(run.folder.resolve()) for run in runs]
    twice = next(
        (run.folder for run, name in zip(runs, names, strict=True) if names.count(name) > 1), None
    )
    if twice is not None:
        raise ValueError(f"{twice}: named more than once; each run counts once")
    groups = group_runs(runs)
    table = paper_table(groups)
    (per_class, left_out), learning = _class_pictures(groups), _learning_pictures(groups)
    repeats = _repeats(groups)
    said = [spread(groups), *(f"{line}." for line in repeats), conditions(groups)]
    said.append(parts_note(len(run.class_names) for run in runs))
    note = " ".join(["Accuracy in %.", *filter(None, said)])
    if any(group.evaluated for group in groups):
        accuracy = markup.table(table, note, words=word_columns(table))
    else:
        accuracy = markup.note("None of the runs has an evaluation.json of its weights yet.")
    remarks = (*repeats, *left_out)
    accuracy += "".join(markup.note(f"{line}.") for line in remarks)
    sections = {
        "Accuracy": accuracy + markup.pictures(per_class),
        "Differences": _differences(groups),
        "Learning": markup.pictures(learning),
        "Runs": markup.table(_run_table(groups), f"Each run. {conditions(groups)}", words=4)
        + markup.paragraph(
            "Confusion, images and features under attack, settings and versions stand in the "
            "report of each run: python -m reat_fast.report RUN",
            muted=True,
        ),
    }
    page = markup.page(_title(runs), "reat_fast runs", _lead(groups), [], sections.items())
    return Report(page, [*per_class, *learning], table, note + _labels(groups), remarks)


def _labels(groups: Sequence[Group]) -> str:
    """List in Markdown how the groups differ, where the rows of the table have no room for it."""
    if all(group.short_label == group.label for group in groups):
        return ""
    return "\n\n" + "\n".join(f"- {markdown_text(group.label)}" for group in groups)


def _title(runs: Sequence[RunRecord]) -> str:
    presets = ", ".join(dict.fromkeys(run.preset for run in runs if run.preset))
    what = " · ".join(dict.fromkeys(f"{run.config.model} on {run.config.dataset}" for run in runs))
    return f"{presets}: {what}" if presets else what


def _lead(groups: Sequence[Group]) -> str:
    runs = sum(len(group.runs) for group in groups)
    return f"{runs} runs in {counted(len(groups), 'group')}. {spread(groups)}"


def _repeats(groups: Sequence[Group]) -> list[str]:
    """Say of which runs no figure counts, for a spread over seeds has each seed once."""
    return [
        f"{run.folder} has the settings and the seed of {first.folder}, so means and spread count "
        "the first of the two alone"
        for group in groups
        for run, first in group.repeated()
    ]


def spread(groups: Sequence[Group]) -> str:
    """Say what the figures of groups are: means and deviations, or those of single runs."""
    seeds = [len(group.measured(name)) for group in groups for name in group.attack_names()]
    if not seeds:
        return ""
    return SPREAD if max(seeds) > 1 else "Each figure is that of one run."


def conditions(groups: Sequence[Group]) -> str:
    """Say under which conditions the figures hold, and of which groups where there are several."""
    found: dict[str, list[tuple[str, RunRecord]]] = {}
    for group in groups:
        for run in group.evaluated:
            found.setdefault(run.protocol_of([]), []).append((group.letter, run))
    told = []
    for members in found.values():
        epochs = [run.weights_epoch for _, run in members if run.weights_epoch is not None]
        *others, last = dict.fromkeys(letter for letter, _ in members)
        letters = f"{', '.join(others)} and {last}" if others else last
        named = f"{letters}: " if len(groups) > 1 and len(found) > 1 else ""
        told.append(f"{named}{members[0][1].protocol_of(epochs)}")
    return "; ".join(told) + "." if told else ""


def _differences(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return ""
    rows: Table = [["setting", *(group.letter for group in groups)]]
    if len({group.preset for group in groups}) > 1:
        rows.append(["preset", *(group.preset or "–" for group in groups)])
    rows += [[name, *(group.differs[name] for group in groups)] for name in groups[0].differs]
    return markup.table(rows, "Settings in which the groups differ.", words=len(groups) + 1)


def _run_table(groups: Sequence[Group]) -> Table:
    attacks = list(dict.fromkeys(name for group in groups for name in group.attack_names()))
    parts = ("overall", "tail")
    accuracies = [f"{attack_title(name)} {part}" for name in attacks for part in parts]
    rows = [
        ["run", "group", "preset", "device and commit", "seed", "epochs", *accuracies]
        + ["images/s", "time"]
    ]
    for group in groups:
        for run in group.runs:
            figures = (run.evaluation or {}).get("attacks", {})
            cells = [
                mean_text([figures[name][part] if name in figures else None])
                for name in attacks
                for part in parts
            ]
            speed = f"{run.images_per_second:,.0f}" if run.timing else "–"
            seconds = sum(time_split(run.timing).values())
            made = f"{run.device}, {str(run.environment.get('commit') or 'no commit')[:9]}"
            epochs = f"{len(run.metrics)}/{run.config.epochs}"
            head = [run.name, group.letter, run.preset or "–", made, str(run.config.seed), epochs]
            rows.append([*head, *cells, speed, duration(seconds) if run.timing else "–"])
    return rows


def _learning_pictures(groups: Sequence[Group]) -> list[Picture]:
    drawn, several = [], len(groups) > 1
    for name, title in (
        ("loss", "Training loss"),
        ("adv_accuracy", "Accuracy on training AEs in %"),
        ("eval_robust", "Robust accuracy while learning in %"),
        ("eval_robust_tail", "Robust accuracy on tail classes in %"),
    ):
        figure = compared_curves(groups, name, title)
        if figure is not None:
            caption = f"A line for each run{', a colour for each group' if several else ''}."
            if name.startswith("eval"):
                caption += " " + evaluated_on(groups)
            words = f"{title} over epochs, {sum(len(group.runs) for group in groups)} runs."
            drawn.append(Picture(name.replace("_", "-"), title, caption, words, figure))
    return drawn


def evaluated_on(groups: Sequence[Group]) -> str:
    """Say on what the runs were evaluated while they learned."""
    kinds = dict.fromkeys(run.config.evaluation for group in groups for run in group.runs)
    return f"Evaluation while learning: {', '.join(kinds)}."


def _class_pictures(groups: Sequence[Group]) -> tuple[list[Picture], list[str]]:
    """Draw the classes under each attack; say why where the runs have not the same ones."""
    attacks = list(dict.fromkeys(name for group in groups for name in group.attack_names()))
    chosen = [name for name in STANDARD_ATTACKS if name in attacks] or attacks[-1:]
    drawn, left_out = [], []
    for name in chosen:
        title = f"{attack_title(name)} accuracy per class"
        shown = [group for group in groups if group.measured(name)]
        runs = [run for group in shown for run in group.measured(name)]
        keys = class_keys(runs[0])
        other = next((run for run in runs if set(class_keys(run)) != set(keys)), None)
        if other is not None:
            left_out.append(
                f"{title}: no picture, for {other.folder} has other classes than "
                f"{runs[0].folder}; report them apart"
            )
            continue
        order = ""
        if any(class_keys(one) != class_keys(next_one) for one, next_one in pairwise(runs)):
            order = f" Classes from the largest to the smallest of {shown[0].letter}."
        words = "; ".join(
            f"{group.letter}: overall {mean_text(group.values(name, 'overall'))} %"
            for group in groups
        )
        caption = f"{spread(shown)} {conditions(shown)}{order}"
        figure = compared_classes(shown, name, keys)
        drawn.append(Picture(f"classes-{name}", title, caption, words, figure))
    return drawn, left_out

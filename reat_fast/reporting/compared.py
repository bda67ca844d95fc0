"""The page of several runs side by side: means and spread over seeds, group by group."""

from __future__ import annotations

from collections.abc import Sequence

from reat_fast.cli.terminal import duration
from reat_fast.evaluation.figures import STANDARD_ATTACKS
from reat_fast.reporting import html as report_html
from reat_fast.reporting.compared_pictures import compared_classes, compared_curves
from reat_fast.reporting.data import RunRecord
from reat_fast.reporting.pages import THIRDS, Report
from reat_fast.reporting.style import Picture
from reat_fast.reporting.tables import (
    Group,
    Table,
    attack_title,
    group_runs,
    mean_text,
    paper_table,
    time_split,
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
    labels = f"{'; '.join(group.label for group in groups)}. " if len(groups) > 1 else ""
    note = f"Accuracy in %. {labels}{SPREAD} {conditions(runs)} {THIRDS}"
    per_class, learning = _class_pictures(groups), _learning_pictures(groups)
    if any(group.evaluated for group in groups):
        accuracy = report_html.table(table, note, words=2 if len(groups) > 1 else 1)
    else:
        accuracy = report_html.note("None of the runs has an evaluation.json of its weights yet.")
    sections = {
        "Accuracy": accuracy + report_html.pictures(per_class),
        "Differences": _differences(groups),
        "Learning": report_html.pictures(learning),
        "Runs": report_html.table(_run_table(groups), f"Each run. {conditions(runs)}", words=3)
        + report_html.paragraph(
            "Confusion, images and features under attack, settings and versions stand in the "
            "report of each run: python -m reat_fast.report RUN",
            muted=True,
        ),
    }
    lead = f"{len(runs)} runs in {len(groups)} {'groups' if len(groups) > 1 else 'group'}. {SPREAD}"
    title = " · ".join(dict.fromkeys(f"{run.config.model} on {run.config.dataset}" for run in runs))
    page = report_html.page(title, "reat_fast runs", lead, [], sections.items())
    return Report(page, [*per_class, *learning], table, note)


def conditions(runs: Sequence[RunRecord]) -> str:
    """Say under which conditions the figures of the runs hold, each once."""
    told = dict.fromkeys(run.protocol for run in runs if run.evaluation is not None)
    return "; ".join(told) + "." if told else ""


def _differences(groups: Sequence[Group]) -> str:
    if len(groups) < 2:
        return ""
    rows: Table = [["setting", *(group.letter for group in groups)]]
    rows += [[name, *(group.differs[name] for group in groups)] for name in groups[0].differs]
    return report_html.table(rows, "Settings in which the groups differ.", words=len(groups) + 1)


def _run_table(groups: Sequence[Group]) -> Table:
    attacks = list(dict.fromkeys(name for group in groups for name in group.attack_names()))
    parts = ("overall", "tail")
    accuracies = [f"{attack_title(name)} {part}" for name in attacks for part in parts]
    rows = [
        ["run", "group", "device and commit", "seed", "epochs", *accuracies, "images/s", "time"]
    ]
    for group in groups:
        for run in group.runs:
            figures = (run.evaluation or {}).get("attacks", {})
            cells = [
                mean_text([figures[name][part] if name in figures else None])
                for name in attacks
                for part in parts
            ]
            speed = f"{run.timing[-1]['images_per_second']:,.0f}" if run.timing else "–"
            seconds = sum(time_split(run.timing).values())
            made = f"{run.device}, {str(run.environment.get('commit') or 'no commit')[:9]}"
            epochs = f"{len(run.metrics)}/{run.config.epochs}"
            head = [run.name, group.letter, made, str(run.config.seed), epochs]
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


def _class_pictures(groups: Sequence[Group]) -> list[Picture]:
    names = next((run.class_names for g in groups for run in g.evaluated), [])
    attacks = list(dict.fromkeys(name for group in groups for name in group.attack_names()))
    chosen = [name for name in STANDARD_ATTACKS if name in attacks] or attacks[-1:]
    drawn = []
    for name in chosen:
        figure = compared_classes(groups, name, names)
        title = f"{attack_title(name)} accuracy per class"
        runs = [run for group in groups for run in group.evaluated]
        caption = f"{SPREAD} {conditions(runs)}"
        words = "; ".join(
            f"{group.letter}: overall {mean_text(group.values(name, 'overall'))} %"
            for group in groups
        )
        drawn.append(Picture(f"classes-{name}", title, caption, words, figure))
    return drawn

"""What stands on the page of one run: its sections, their pictures and the words about them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from reat_fast.cli.terminal import counted, duration
from reat_fast.config import Config
from reat_fast.evaluation.figures import SELECTION
from reat_fast.methods.attacks import resolve_attack_loss
from reat_fast.reporting import curves, markup, pictures, probe_pictures
from reat_fast.reporting.groups import group_runs
from reat_fast.reporting.probe import Probe
from reat_fast.reporting.run_record import RunRecord
from reat_fast.reporting.settings import settings_section
from reat_fast.reporting.style import FEW, Picture
from reat_fast.reporting.tables import (
    Table,
    attack_title,
    main_attack,
    mean_text,
    paper_table,
    part_of_class,
    parts_note,
    time_split,
    word_columns,
)


@dataclass(frozen=True)
class Report:
    """Hold a finished report: the page, its pictures, and the table for papers as Markdown rows.

    remarks: lines that a reader of the terminal needs too.
    """

    page: str
    pictures: list[Picture]
    table: Table
    table_note: str
    remarks: tuple[str, ...] = ()


def run_report(run: RunRecord, probe: Probe | None, missing: str = "") -> Report:
    """Write the report of one run; missing says why there is no probe."""
    made = {
        "Accuracy": _accuracy_pictures(run),
        "Learning": _learning_pictures(run),
        "Class statistics": _statistics_pictures(run),
        "Under attack": _probe_pictures(run, probe) if probe is not None else [],
        "Time": _time_pictures(run),
    }
    shown = {heading: markup.pictures(drawn) for heading, drawn in made.items()}
    table = paper_table(group_runs([run]))
    shown["Accuracy"] = _accuracy_tables(run, table) + shown["Accuracy"]
    if probe is None and missing:
        shown["Under attack"] = markup.note(missing)
    if run.timing:
        shown["Time"] = _time_table(run) + shown["Time"]
    shown["Settings and machine"] = settings_section(run)
    page = markup.page(_title(run), "reat_fast run", _lead(run), _tiles(run), shown.items())
    drawn = [picture for group in made.values() for picture in group]
    return Report(page, drawn, table, _table_note(run))


def _table_note(run: RunRecord) -> str:
    return f"Accuracy in %: {run.protocol}. {parts_note([len(run.class_names)])}".rstrip()


def _title(run: RunRecord) -> str:
    """Name a run and, where its folder is not named after it, its preset."""
    told = re.sub(r"-\d+$", "", run.name) == run.preset
    return run.name if told or not run.preset else f"{run.name} ({run.preset})"


def _lead(run: RunRecord) -> str:
    config, done = run.config, len(run.metrics)
    preset = f"Preset {run.preset}, " if run.preset else ""
    epochs = f"{done} of {counted(config.epochs, 'epoch')}"
    text = (
        f"{preset}{config.model} on {config.dataset}, {epochs}, seed {config.seed}, {run.device}."
    )
    if run.counts:
        largest, smallest = max(run.counts), max(min(run.counts), 1)
        text += (
            f" Trained on {sum(run.counts):,} images in {len(run.counts)} classes of "
            f"{largest:,} to {min(run.counts):,} (ratio {largest / smallest:.0f})."
        )
    tested = "Not evaluated yet." if run.evaluation is None else f"Evaluated on {run.protocol}."
    return f"{text} {tested}"


def _tiles(run: RunRecord) -> list[tuple[str, str, str]]:
    tiles = []
    if run.evaluation is not None:
        attacks, main = run.evaluation["attacks"], main_attack(run.evaluation)
        names = dict.fromkeys([*(["clean"] if "clean" in attacks else []), main])
        tiles += [(attack_title(n), _percent(attacks[n]["overall"]), "overall") for n in names]
        for part, detail in (("balanced", "mean of classes"), ("tail", "tail classes")):
            tiles.append((attack_title(main), _percent(attacks[main][part]), detail))
        tiles.append((attack_title(main), _percent(attacks[main]["worst"]), "worst class"))
    elif run.metrics:
        tiles.append(("Training AEs", _percent(run.metrics[-1]["adv_accuracy"]), "last epoch"))
    if run.timing:
        seconds = sum(time_split(run.timing).values())
        spent = duration(seconds).replace(" ", "\N{NO-BREAK SPACE}")
        detail = f"training images/s, {spent} in all"
        tiles.append(("Throughput", f"{run.images_per_second:,.0f}", detail))
    return tiles


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def _accuracy_tables(run: RunRecord, table: Table) -> str:
    if run.evaluation is None:
        why = "No evaluation.json: the run is still going on, or ended early."
        if run.outdated:
            why = "The weights were trained on since evaluation.json, which is left out."
        return markup.note(
            f"{why} Evaluate it with: python -m reat_fast.evaluate {shlex.quote(str(run.folder))}"
        )
    warnings = "".join(markup.note(str(line)) for line in run.evaluation.get("warnings", []))
    return (
        warnings
        + markup.table(table, _table_note(run), words=word_columns(table))
        + markup.table(
            class_table(run),
            f"Accuracy in % and images per class; {run.protocol}.",
            words=2,
            folded=f"All {len(run.evaluation['class_names'])} classes in figures",
        )
    )


def class_table(run: RunRecord) -> Table:
    """Lay out the classes of an evaluated run: part, images, accuracy under each attack."""
    evaluation = run.evaluation or {}
    attacks, names = evaluation["attacks"], evaluation["class_names"]
    counts, tested = run.counts, evaluation.get("per_class_samples")
    rows = [["class", "part", "training images", "test images", *map(attack_title, attacks)]]
    for c, (name, part) in enumerate(zip(names, part_of_class(len(names)), strict=True)):
        images = [f"{numbers[c]:,}" if numbers else "–" for numbers in (counts, tested)]
        cells = [mean_text([figures["per_class"][c]]) for figures in attacks.values()]
        rows.append([name, part, *images, *cells])
    return rows


def _accuracy_pictures(run: RunRecord) -> list[Picture]:
    if run.evaluation is None:
        return []
    attacks, main = run.evaluation["attacks"], main_attack(run.evaluation)
    evaluation = {**run.evaluation, "train_counts": run.counts}
    others = ""
    if set(attacks) - {"clean", main}:
        few = len(run.class_names) <= FEW
        others = "; marks: other attacks" if few else "; other attacks: in the tables"
    said = ", ".join(
        f"{part} {mean_text([attacks[main][part]])} %" for part in ("head", "body", "tail")
    )
    return [
        Picture(
            "accuracy",
            "Accuracy per class, beside class sizes",
            f"Pale: clean; solid: {attack_title(main)}{others}. {run.protocol}.",
            f"Accuracy per class under {attack_title(main)}: {said}.",
            pictures.class_accuracy(evaluation),
        )
    ]


def _learning_pictures(run: RunRecord) -> list[Picture]:
    if not run.metrics:
        return []
    last = run.metrics[-1]
    evaluated: str = run.config.evaluation
    if evaluated in SELECTION:
        attack, figure = SELECTION[evaluated]
        where = "the test set" if evaluated == "official" else "held-out training images"
        evaluated = f"{attack_title(attack)} on {where}, {figure}"
    return [
        Picture(
            "loss",
            "Loss",
            "Means over the adversarial examples of each epoch.",
            f"Training loss over {counted(len(run.metrics), 'epoch')}, "
            f"{last['loss']:.3f} in the last.",
            curves.loss_curves(run.metrics),
        ),
        Picture(
            "learning",
            "Accuracy while learning",
            f"Training AEs before each update; evaluations: {evaluated}.",
            f"Accuracy over {counted(len(run.metrics), 'epoch')}; on training AEs "
            f"{last['adv_accuracy']:.1f} % in the last.",
            curves.accuracy_curves(run.metrics),
        ),
    ]


def _statistics_pictures(run: RunRecord) -> list[Picture]:
    fits = run.counts and run.ae_counts and len(run.ae_counts[0]) == len(run.counts)
    if not fits or run.counts is None:
        return []
    arguments = (run.counts, run.ae_counts, run.class_names)
    few = len(run.counts) <= FEW
    before, after = ("Hollow", "solid") if few else ("Line", "dots")
    never = sum(n == 0 for n in run.ae_counts[-1])
    predictions = Picture(
        "predictions",
        "What training AEs are predicted as",
        "Share of predictions over share of training images: orange, a class predicted more "
        "rarely than its size suggests; purple, more often.",
        f"Heat map of classes over {counted(len(run.ae_counts), 'epoch')}; in the last, {never} of "
        f"{len(run.counts)} classes were never predicted.",
        pictures.prediction_histogram(*arguments),
    )
    acts = _use_of_weights(run.config)
    if not acts:
        return [predictions]
    weights = Picture(
        "weights",
        "RBL weights",
        f"{before}: from class sizes alone; {after}: after the last epoch. {acts}",
        "RBL weight of each class before the first and after the last epoch.",
        pictures.weight_chart(*arguments),
    )
    return [predictions, weights]


def _use_of_weights(config: Config) -> str:
    """Say what the RBL weights do in the attack of a run, "" for a method that has none."""
    if config.attack == "free" or config.attack_loss not in ("auto", "rbl", "rbl_offsets"):
        return ""
    used = resolve_attack_loss(config)
    if used == "ce":
        return (
            "This run's attack used plain cross-entropy: with BatchNorm in eval mode these "
            "weights cannot change an adversarial example."
        )
    in_vain = used == "rbl" and config.attack_batchnorm == "eval"
    effect = ", which with BatchNorm in eval mode changes no adversarial example" * in_vain
    return f"This run's attack used them (attack loss {used}){effect}."


def _probe_pictures(run: RunRecord, probe: Probe) -> list[Picture]:
    names = run.class_names
    right = 100 * float((probe.labels == probe.predictions).mean())
    return [
        Picture(
            "examples",
            "Clean, attacked, and what changed",
            "Largest head and smallest tail classes; below each image what it is taken for. "
            f"Perturbation: grey is no change, the ends are ±eps. {probe.conditions}.",
            f"{len(probe.examples)} test images, clean, attacked and their difference.",
            probe_pictures.example_grid(probe, names),
        ),
        Picture(
            "confusion",
            "Confusion, clean and under attack",
            f"In % of each true class, classes from largest to smallest. {probe.conditions}.",
            f"Confusion matrices of {len(names)} classes; {right:.1f} % of the images are "
            "classified right under attack.",
            probe_pictures.confusion_maps(probe, names),
        ),
        Picture(
            "features",
            "Features",
            "Last-layer features in the plane of the largest variance of clean images. "
            f"{probe.conditions}.",
            "Scatter plot of features by class, clean and under attack.",
            probe_pictures.feature_map(probe, names),
        ),
    ]


def _time_pictures(run: RunRecord) -> list[Picture]:
    if not run.timing:
        return []
    caption = f"On {run.device}. Throughput counts training alone, without the first step."
    words = f"Seconds and throughput of {counted(len(run.timing), 'epoch')}."
    return [Picture("time", "Epoch by epoch", caption, words, curves.time_chart(run.timing))]


def _time_table(run: RunRecord) -> str:
    split = time_split(run.timing)
    total = max(sum(split.values()), 1e-9)
    rows = [["", "time", "share"]]
    rows += [[name, _seconds(s), f"{100 * s / total:.1f} %"] for name, s in split.items()]
    rows.append(["all", _seconds(sum(split.values())), "100.0 %"])
    return markup.table(rows, f"Where the time went, on {run.device}.")


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else duration(seconds)

"""The report: figures made by hand, what stands on the page, and what a damaged folder says."""

from __future__ import annotations

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import made_images, made_npz
from made_run import COUNTS, EVIL, made_run, rewrite

from reat_fast import report, train
from reat_fast.checkpoint import CHECKPOINT
from reat_fast.cli.command import run_command
from reat_fast.config import PRESETS
from reat_fast.data import ImageSet
from reat_fast.evaluate import Attack, evaluate
from reat_fast.evaluation.saved import weights_sha256
from reat_fast.models import create_model
from reat_fast.objective import rbl_weights
from reat_fast.reporting import curves, markup, pictures, probe_pictures
from reat_fast.reporting.compared import compared_report
from reat_fast.reporting.compared_pictures import class_keys, class_means
from reat_fast.reporting.groups import group_runs
from reat_fast.reporting.pages import run_report
from reat_fast.reporting.probe import choose_examples, principal_points, probe, probe_run
from reat_fast.reporting.run_record import PARTS, read_run
from reat_fast.reporting.settings import changed_settings, settings_section
from reat_fast.reporting.style import (
    COLOURS,
    FEW,
    PART_COLOURS,
    Picture,
    new_figure,
    plain_numbers,
    svg,
)
from reat_fast.reporting.tables import (
    attack_title,
    epoch_times,
    main_attack,
    markdown,
    mean_text,
    paper_table,
    parts_note,
    time_split,
)
from reat_fast.storage.whole_files import alone
from reat_fast.training.progress import TrainingClock

AT_BSL = {"objective": "bsl", "tail": "none", "attack_loss": "ce", "start": "normal"}
AT_BSL |= {"milestones": (1, 1)}
QUICK = {"dataset": "fashion-mnist", "model": "resnet8", "lr": 0.2, "schedule": "onecycle"}
QUICK |= {"augment": False, "select": "last"}


def command(*arguments: object) -> int:
    return run_command(report.main, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return made_run(tmp_path / "run")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make figures without drawing them, which takes nine tenths of the time of a report."""
    monkeypatch.setattr(markup, "svg", lambda picture: "<svg />")
    monkeypatch.setattr(report, "write_png", lambda file, figure: file.touch())


def test_mean_and_sample_deviation_by_hand() -> None:
    assert mean_text([1.0, 2.0, 3.0]) == "2.00 ± 1.00"
    assert mean_text([1.0, None, 2.0]) == "1.50 ± 0.71"
    assert mean_text([1.0, 3.0], digits=1) == "2.0 ± 1.4"  # sqrt(2), not the population's 1
    assert mean_text([12.5]) == "12.50"
    assert mean_text([None]) == mean_text([]) == "–"


def test_runs_that_differ_in_the_seed_alone_are_averaged(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / f"a{k}", overall=40.0 + k, seed=k) for k in range(3)]
    folders += [made_run(tmp_path / "b", overall=30.0, tail="none", seed=0)]
    first, second = group_runs([read_run(folder) for folder in folders])
    assert [run.name for run in first.runs] == ["a0", "a1", "a2"]
    assert first.label == "A: tail=official" and second.label == "B (b): tail=none"
    heading, *rows = paper_table([first, second])
    assert heading == ["group", "attack", *PARTS, "runs"]
    assert rows[0] == ["A: tail=official", "Clean", *["70.00 ± 0.00"] * 6, "3"]
    assert rows[1] == ["A: tail=official", "PGD-20", *["41.00 ± 1.00"] * 6, "3"]
    assert rows[3] == ["B (b): tail=none", "PGD-20", *["30.00"] * 6, "1"]


def test_runs_evaluated_under_other_conditions_stand_apart(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / name, seed=k) for k, name in enumerate("abcde")]
    rewrite(folders[1] / "evaluation.json", eps=4 / 255)
    rewrite(folders[4] / "evaluation.json", images_sha256="0123456789abcdef")
    rewrite(folders[2] / "evaluation.json", restarts=1)  # one start is what a missing entry means
    (folders[3] / "evaluation.json").unlink()
    groups = group_runs([read_run(folder) for folder in folders])
    assert [[run.name for run in group.runs] for group in groups] == [
        ["a", "c"],
        ["b"],
        ["d"],
        ["e"],
    ]
    assert groups[1].differs["test eps"] == "4/255"
    assert groups[3].differs["test images_sha256"] == "0123456789ab"
    assert groups[2].differs["test eps"] == "unset" and groups[2].values("pgd20", "tail") == []


def test_class_means_by_hand(tmp_path: Path) -> None:
    runs = [read_run(made_run(tmp_path / str(seed), seed=seed)) for seed in (0, 1)]
    assert runs[1].evaluation is not None
    runs[1].evaluation["attacks"]["pgd20"]["per_class"] = [60.0, 60.0, 41.0, None, 20.0]
    (group,) = group_runs(runs)
    keys = class_keys(runs[0])
    found = class_means(group, "pgd20", keys)
    assert found is not None and class_means(group, "aa", keys) is None
    nan = float("nan")
    np.testing.assert_allclose(found[0], [70, 60, 40.5, nan, 20])
    np.testing.assert_allclose(found[1], [200**0.5, 0, 0.5**0.5, nan, 0])


def test_a_markdown_table_shows_its_cells_as_they_are() -> None:
    text = markdown([["group", "overall"], ["a|b_<i>\n*c*", "1.00 ± 0.50"]])
    assert text.splitlines() == [
        "| group | overall |",
        "| :-- | --: |",
        r"| a\|b\_&lt;i&gt; \*c\* | 1.00 ± 0.50 |",
    ]


def test_attacks_are_named_as_papers_do() -> None:
    names = ["clean", "fgsm", "pgd20", "cw20", "aa", "aa-package", "l2aa", "l2pgd20"]
    titles = ["Clean", "FGSM", "PGD-20", "CW-20", "AutoAttack", "pyautoattack"]
    titles += ["L2 AutoAttack", "L2 PGD-20"]
    assert list(map(attack_title, names)) == titles


def test_robustness_is_pgd20_or_else_what_was_attacked_last() -> None:
    for names, chosen in (
        *(("clean pgd20 aa", "pgd20"), ("clean fgsm cw20", "cw20"), ("clean",) * 2),
        *(("clean aa l2pgd20", "aa"), ("l2pgd20 clean", "l2pgd20")),
    ):
        assert main_attack({"attacks": dict.fromkeys(names.split())}) == chosen


def test_time_is_split_as_a_fake_clock_ran() -> None:
    now = [0.0]
    clock = TrainingClock(work=4, clock=lambda: now[0])
    rows: list[dict[str, float | None]] = []
    for steps, evaluation in (((3.0, 1.0), 0.5), ((1.0, 1.0), 2.0)):
        before, began = clock.training_seconds, now[0]
        clock.resume()
        for seconds in steps:
            now[0] += seconds
            clock.step(10, 1)
        clock.catch_up()
        now[0] += evaluation
        rows.append(
            {
                "seconds": now[0] - began,
                "training_seconds": clock.training_seconds - before,
                "warm_up_seconds": clock.warm_up_seconds,
            }
        )
    assert time_split(rows) == {"warm-up": 3.0, "training": 3.0, "evaluation and saving": 2.5}
    resumed: dict[str, float | None] = {
        "seconds": 7.0,
        "training_seconds": 2.0,
        "warm_up_seconds": 5.0,
    }
    spent = [row["warm-up"] for row in epoch_times([*rows, resumed])]
    assert spent == [3.0, 0.0, 5.0]  # each process warms up once
    rounded = {"seconds": 6.999, "training_seconds": 2.0, "warm_up_seconds": 5.0}
    assert time_split([rounded])["evaluation and saving"] == 0.0


def test_the_throughput_of_a_run_is_that_of_all_its_epochs(run: Path) -> None:
    record = read_run(run)
    assert record.images_per_second == (8 * 95 + 8 * 79) / 16
    rewritten = dataclasses.replace(record, timing=[])
    assert rewritten.images_per_second == 0


def test_the_page_of_a_run_has_the_figures_and_their_conditions(run: Path) -> None:
    assert command(run, "--no-model") == 0
    page = (run / "report.html").read_text("utf-8")
    for shown in (
        "70.0 %",
        "50.0 %",
        "cifar10, 1,000 test images, L-infinity eps 8/255, step 2/255, best.safetensors of epoch 2",
        "760 images in 5 classes of 400 to 10 (ratio 40)",
        "0123456789abcdef",
        "Made CPU",
        "2 of 2 epochs, seed 0",
        "Left out with --no-model",
        "training images/s, 23\N{NO-BREAK SPACE}s in all",
    ):
        assert shown in page
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert names == {"accuracy", "loss", "learning", "predictions", "weights", "time"}
    for name in names:
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    table = (run / "report" / "table.md").read_text("utf-8")
    assert "| PGD-20 | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 | 50.00 | 1 |" in table
    assert "eps 8/255" in table


class Tags(HTMLParser):
    """Collect tags, attributes and text; fail on tags that do not close."""

    VOID = ("meta", "link")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.names: set[str] = set()
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "with BatchNorm in eval mode these weights cannot change an adversarial example"),
        ({"attack_loss": "rbl_offsets"}, "attack used them (attack loss rbl_offsets)."),
        ({"attack_batchnorm": "train"}, "attack used them (attack loss rbl)."),
        (
            {"attack_loss": "rbl"},
            "used them (attack loss rbl), which with BatchNorm in eval mode changes no",
        ),
    ],
)
def test_the_page_says_what_the_weights_did(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    folder = made_run(tmp_path / "run", **settings)
    assert command(folder, "--no-model") == 0
    assert words in (folder / "report.html").read_text("utf-8")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "settings",
    [
        {"attack": "free"},
        {"attack_loss": "ce"},
        {"attack_loss": "ce", "attack_batchnorm": "train"},
        {"attack_loss": "ce", "attack": "n-fgsm"},
        {"attack_loss": "bsl"},
    ],
)
def test_the_page_shows_no_rbl_weights_of_a_method_that_has_none(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = made_run(tmp_path / "run", **settings)
    assert command(folder, "--no-model") == 0
    page = (folder / "report.html").read_text("utf-8")
    assert "What training AEs are predicted as" in page and "RBL" not in page
    assert not (folder / "report" / "weights.png").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_report_names_the_preset_of_its_run(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "o4")
    rewrite(folder / "split.json", preset="<taet>")
    assert command(folder, "--no-model") == 0
    page = Tags((folder / "report.html").read_text("utf-8"))
    assert "o4 (<taet>)" in page.text and "Preset <taet>, resnet18 on cifar10" in page.text
    table = (folder / "report" / "table.md").read_text("utf-8")
    assert table.startswith("| preset | attack |") and "| &lt;taet&gt; | PGD-20 | 50.00" in table
    numbered = folder.rename(tmp_path / "<taet>-1")
    assert "<h1>&lt;taet&gt;-1</h1>" in run_report(read_run(numbered), None).page


def test_the_preset_of_an_older_run_is_that_of_its_checkpoint_or_unknown(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    assert read_run(folder).preset == ""
    torch.save({"preset": "taet"}, folder / CHECKPOINT)
    assert read_run(folder).preset == "taet"
    (folder / CHECKPOINT).unlink()
    told = json.loads((folder / "config.json").read_text())
    exported = {"library_name": "reat_fast", "preset": "reat", "training": told}
    (folder / "config.json").write_text(json.dumps(exported))
    assert read_run(folder).preset == "reat"


@pytest.mark.usefixtures("undrawn")
def test_several_runs_are_told_apart_by_their_presets(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / "a"), made_run(tmp_path / "b", lr=0.05)]
    folders += [made_run(tmp_path / "c", lr=0.01)]
    for folder, preset in zip(folders, ("reat", "taet"), strict=False):
        rewrite(folder / "split.json", preset=preset)
    out = tmp_path / "page.html"
    assert command(*folders, "--out", out) == 0
    page, table = out.read_text("utf-8"), (tmp_path / "page" / "table.md").read_text("utf-8")
    assert "<h1>reat, taet: resnet18 on cifar10</h1>" in page
    assert "<td>reat</td><td>taet</td><td>–</td>" in page
    assert table.startswith("| group | preset | attack |")
    assert "| B (b): lr=0.05 | taet | Clean |" in table and "| C (c): lr=0.01 | – |" in table


@pytest.mark.parametrize(
    ("preset", "settings", "changed"),
    [
        # Two epochs of 80: each milestone comes in the first.
        ("reat", {"milestones": (1, 1), "beta": 3.0}, []),
        ("reat", {"milestones": (1, 1), "attack_loss": "ce", "lr": 0.05}, ["lr 0.05 0.1"]),
        ("at-bsl", {**AT_BSL, "steps": 3}, ["steps 3 10"]),
        ("at-bsl", {**AT_BSL, "attack": "n-fgsm", "steps": 3}, ["attack n-fgsm pgd"]),
        ("quickstart", {**QUICK, "imbalance_profile": "as-is"}, ["imbalance_profile as-is exp"]),
        ("", {}, ["milestones 60 75 1 1"]),
        ("of another version", {"milestones": (1, 1), "lr": 0.05}, ["lr 0.05 0.1"]),
    ],
)
def test_settings_are_compared_with_those_of_the_preset(
    preset: str, settings: dict[str, Any], changed: list[str], tmp_path: Path
) -> None:
    folder = made_run(tmp_path / "run", **settings)
    rewrite(folder / "split.json", preset=preset)
    heading, epochs, *others = changed_settings(read_run(folder))
    known = preset in PRESETS
    assert heading == ["setting", "value", "preset" if known else "default"]
    assert epochs == ["epochs", "2", str(PRESETS[preset if known else "reat"].epochs)]
    assert [" ".join(row) for row in others] == changed


def test_the_title_of_changed_settings_says_what_they_are_compared_with(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run")
    for preset, title in (
        ("", "Settings that differ from the defaults, in proportion to 2 epochs"),
        ("taet", "Settings that differ from the preset taet, in proportion to 2 epochs"),
        ("lost", "Settings that differ from the defaults, since this version has no preset lost"),
    ):
        rewrite(folder / "split.json", preset=preset)
        assert title in settings_section(read_run(folder))
    config = json.loads((folder / "config.json").read_text()) | {"epochs": 80}
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder / "split.json", preset="reat")
    said = "Settings that differ from the preset reat: none that has an effect."
    assert said in settings_section(read_run(folder))


@pytest.mark.parametrize(
    ("classes", "sizes"),
    [(2, "1, 0 and 1"), (6, "2, 3 and 1"), (9, "3, 4 and 2"), (10, "3, 4 and 3")],
)
def test_a_note_counts_the_classes_of_head_body_and_tail(classes: int, sizes: str) -> None:
    said = f"Head, body and tail are the {sizes} of {classes} classes with the most"
    assert parts_note([classes, classes]).startswith(said)
    assert parts_note([]) == parts_note([0]) == ""


@pytest.mark.usefixtures("undrawn")
def test_reports_count_the_classes_of_head_body_and_tail(run: Path, tmp_path: Path) -> None:
    assert command(run, "--no-model") == 0
    other, out = made_run(tmp_path / "other", lr=0.05), tmp_path / "page.html"
    assert command(run, other, "--out", out) == 0
    (other / "evaluation.json").unlink()
    split = {"class_names": [*map(str, range(6))], "train_counts": [6, 5, 4, 3, 2, 1]}
    rewrite(other / "split.json", **split)
    for file in (run / "report.html", run / "report" / "table.md", out):
        said = file.read_text("utf-8")
        assert "are the 1, 2 and 2 of 5 classes with the most to the fewest" in said
        assert "thirds" not in said
    note = compared_report([read_run(run), read_run(other)]).table_note
    assert "are the 1, 2 and 2 of 5 classes or the 2, 3 and 1 of 6 classes with" in note


def test_names_are_shown_and_never_become_part_of_the_page(tmp_path: Path) -> None:
    run = made_run(tmp_path / "<img src=x onerror=alert(1)>", model="resnet18")
    assert command(run, "--no-model") == 0
    page = Tags((run / "report.html").read_text("utf-8"))
    assert "script" not in page.names and "img" not in page.names
    for name in (*EVIL, run.name):
        assert name in page.text
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value is not None and value.startswith(("#", "data:"))
    assert len({v for n, v in page.attributes if n == "id"}) == sum(
        n == "id" for n, _ in page.attributes
    )


def test_pictures_follow_the_theme_and_have_words(run: Path) -> None:
    figure = pictures.class_accuracy(read_run(run).evaluation or {})
    drawn = svg(Picture("p", "Title", "Caption", 'Words <"&', figure))
    assert 'role="img" aria-label="Words &lt;&quot;&amp;"' in drawn
    for name, (light, _) in COLOURS.items():
        assert light not in drawn
        if name in PART_COLOURS:
            assert f"var(--{name})" in drawn
    page = markup.page("title", "kicker", "lead", [], [])
    for name, (light, dark) in COLOURS.items():
        assert f"--{name}: {light};" in page and f"--{name}: {dark};" in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_bars_and_marks_have_the_heights_of_the_figures(run: Path) -> None:
    evaluation = read_run(run).evaluation or {}
    per_class = [50.0, 50.0, 30.0, None, 10.0]
    evaluation["attacks"]["fgsm"] = {**evaluation["attacks"]["pgd20"], "per_class": per_class}
    axes = pictures.class_accuracy({**evaluation, "train_counts": COUNTS}).axes
    bars = [bar.get_height() for bar in axes[0].patches]
    assert bars == [90, 80, 60, 0, 40, 80, 60, 40, 0, 20]
    assert [bar.get_height() for bar in axes[1].patches] == COUNTS
    (marks,) = axes[0].lines
    assert list(np.asarray(marks.get_ydata())) == [50, 50, 30, 0, 10]


@pytest.mark.parametrize(
    ("terms", "drawn"),
    [
        ({"bsl": 1.5, "tail": 0.5}, ["whole loss", "balanced softmax", "tail penalty"]),
        ({"bsl": 2.0, "tail": 0.0}, ["whole loss"]),
        ({"ce": 2.0}, ["whole loss"]),
        ({"ce": 1.0, "kl": 1.0}, ["whole loss", "cross-entropy", "divergence"]),
    ],
)
def test_terms_of_the_loss_are_drawn_where_there_are_several(
    terms: dict[str, float], drawn: list[str]
) -> None:
    rows = [{"epoch": epoch, "loss": 2.0, **terms} for epoch in (1.0, 2.0)]
    (axes,) = curves.loss_curves(rows).axes
    assert [line.get_label() for line in axes.lines] == drawn
    assert [list(np.asarray(line.get_ydata())) for line in axes.lines[1:]] == [
        [value, value] for value in terms.values() if len(drawn) > 1
    ]


def test_the_prediction_map_holds_ratios_of_shares() -> None:
    figure = pictures.prediction_histogram([4, 4], [[8, 0], [2, 6], [4, 4]], ["a", "b"])
    shown = np.asarray(figure.axes[0].images[0].get_array())
    # Rows are classes, columns epochs; log2, cut off at an eighth.
    np.testing.assert_allclose(shown, [[1, -1, 0], [-3, np.log2(1.5), 0]])


def test_the_weight_chart_holds_the_weights_of_the_objective() -> None:
    figure = pictures.weight_chart([40, 4], [[9, 9], [30, 1]], ["a", "b"])
    counts = torch.tensor([40, 4])
    first, last = rbl_weights(counts, counts), rbl_weights(counts, torch.tensor([30, 1]))
    # Body is empty: head and tail have two lines each, before and after.
    drawn = [float(y) for line in figure.axes[0].lines for y in np.asarray(line.get_ydata())]
    expected = [first[0], last[0], first[1], last[1]]
    assert drawn == [float(weight) for weight in expected]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.3, 3.5, ["0.5", "1", "2"]),
        (0.9, 2.4, ["0.9", "1", "2"]),
        (10, 1000, ["10", "100", "1,000"]),
        (10, 10000, ["10", "100", "1,000", "10,000"]),
        (0.001, 40, ["0.001", "0.01", "0.1", "1", "10"]),
    ],
)
def test_a_logarithmic_axis_has_labels_however_short_it_is(
    low: float, high: float, labels: list[str]
) -> None:
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot([low, high])
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_numbers(axes.yaxis)
    figure.canvas.draw()
    ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    seen = [label.get_text() for place, label in ticks if low <= place <= high]
    assert seen == labels


@pytest.mark.usefixtures("undrawn")
def test_attacks_that_a_report_does_not_show_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_run(tmp_path / "run")
    flags = [str(folder), "--no-model", "--out", str(tmp_path / "out.html")]
    assert run_command(report.main, flags) == 0
    assert "not shown" not in capsys.readouterr().out
    (folder / "evaluation-2.json").write_text((folder / "evaluation.json").read_text())
    assert run_command(report.main, flags) == 0
    shown = f"other evaluations are not shown: {folder / 'evaluation-2.json'}"
    assert shown in capsys.readouterr().out


def test_confusion_by_hand() -> None:
    labels, predictions = np.array([0, 0, 0, 0, 2]), np.array([0, 0, 0, 1, 1])
    shares = probe_pictures.confusion(labels, predictions, 3)
    np.testing.assert_array_equal(shares, [[75, 25, 0], [np.nan] * 3, [0, 100, 0]])


def test_principal_points_keep_distances_in_a_plane() -> None:
    torch.manual_seed(0)
    plane, _ = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64))
    flat = torch.randn(40, 2, dtype=torch.float64) * torch.tensor([3.0, 1.0])
    points, others, explained = principal_points(flat @ plane.T + 5, flat[:3] @ plane.T + 5)
    # Computed in float64, returned in float32: 2^-24 of distances up to about 15.
    found = torch.cdist(torch.from_numpy(points).double(), torch.from_numpy(points).double())
    torch.testing.assert_close(found, torch.cdist(flat, flat), atol=1e-5, rtol=0)
    np.testing.assert_array_equal(others, points[:3])
    assert explained[0] > explained[1] and sum(explained) == pytest.approx(1)
    single, _, shares = principal_points(torch.ones(1, 4), torch.ones(1, 4))
    assert single.tolist() == [[0.0, 0.0]] and shares == (0.0, 0.0)


def test_examples_are_right_answers_of_head_and_tail_where_there_are_any() -> None:
    labels = np.array([2, 0, 0, 8, 8, 7, 1])  # nine classes: head 0 to 2, tail 7 and 8
    predictions = np.array([2, 1, 0, 0, 0, 7, 1])
    assert choose_examples(labels, predictions, 9) == [2, 6, 0, 5, 3]


def test_the_probe_attacks_as_the_evaluation_does() -> None:
    torch.manual_seed(0)
    labels = np.arange(20, dtype=np.int64) % 4
    image_set = ImageSet(made_images(labels, 3, seed=4), labels)
    model = create_model("resnet8", 4, width=8).eval()
    found = probe(model, image_set, 4, eps=0.1, step_size=0.02, seed=7)
    attacks = [Attack.from_name(name, 0.1, 0.02) for name in ("clean", "pgd20")]
    expected = evaluate(model, image_set, attacks, 4, eps=0.1, seed=7)["attacks"]
    right = found.predictions == labels, found.clean_predictions == labels
    assert 100 * right[0].mean() == pytest.approx(expected["pgd20"]["overall"])
    assert 100 * right[1].mean() == pytest.approx(expected["clean"]["overall"])
    away = np.abs(found.attacked - found.clean).max()
    assert 0.05 < away <= 0.1 + 1e-6  # the ball, and a rounding of images near 1
    assert found.points.shape == found.attacked_points.shape == (20, 2)


@pytest.mark.parametrize("classes", [FEW, FEW + 1, 1000])
def test_only_few_classes_are_named(classes: int) -> None:
    names, counts = [f"name {c}" for c in range(classes)], [classes + 5 - c for c in range(classes)]
    for figure in (
        pictures.prediction_histogram(counts, [counts], names),
        pictures.weight_chart(counts, [counts], names),
    ):
        figure.canvas.draw()
        texts = [t.get_text() for t in figure.findobj(match=lambda a: hasattr(a, "get_text"))]
        assert (f"name {classes - 1}" in texts) == (classes <= FEW)
        assert len(texts) < 200


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"epochs": 2, '),
        ("config.json", '{"epochs": -1}'),
        ("env.json", "[]"),
        ("env.json", '{"gpus": 3}'),
        ("env.json", '{"gpus": {"name": "Made GPU"}}'),
        ("env.json", '{"gpus": ["Made GPU"]}'),
        ("split.json", '{"class_names": ["a"]}'),
        ("split.json", '{"class_names": ["a"], "train_counts": [1], "preset": ["reat"]}'),
        ("split.json", '{"class_names": ["a"], "train_counts": [1, 2]}'),
        ("split.json", '{"class_names": ["a"], "train_counts": [Infinity]}'),
        ("metrics.csv", "epoch,loss,adv_accuracy\n1,2.0\n"),
        ("metrics.csv", "epoch,loss,adv_accuracy,ae_counts\n1,2.0,many,1 2\n"),
        ("metrics.csv", "epoch,lr\n1,0.1\n"),
        ("metrics.csv", "garbage\n"),
        ("timing.csv", "epoch,seconds\n1,2\n"),
        ("timing.csv", "\0\xff"),
        ("evaluation.json", "{}"),
        ("evaluation.json", "[" * 100_000),
        ("evaluation.json", '{"class_names": 3}'),
        ("evaluation.json", '{"class_names": ["a"], "eps": 0.1, "samples": 1, "attacks": {}}'),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(
    run: Path, name: str, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_bytes(content.encode("latin-1"))
    assert command(run, "--no-model") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run / name}: damaged") and error.count("\n") == 1
    assert "restore it" in error and not (run / "report.html").exists()


def test_percentages_and_lengths_of_an_evaluation_are_checked(run: Path) -> None:
    good = json.loads((run / "evaluation.json").read_text())
    for change in ({"overall": 101.0}, {"tail": "much"}, {"per_class": [1.0]}):
        attacks = {**good["attacks"], "pgd20": {**good["attacks"]["pgd20"], **change}}
        rewrite(run / "evaluation.json", attacks=attacks)
        with pytest.raises(ValueError, match="evaluation.json: damaged"):
            read_run(run)


@pytest.mark.parametrize(
    "changes",
    [
        {"eps": "0.1"},
        {"eps": -float("inf")},
        {"step_size": "2/255"},
        {"step_size": [2 / 255]},
        {"l2_eps": 10**400},
        {"samples": "1000"},
        {"samples": float("inf")},
        {"seed": []},
        {"weights_epoch": [2]},
        {"weights_epoch": None},
        {"train_counts": [float("inf"), 4, 3, 2, 1]},
        {"train_counts": ["5", 4, 3, 2, 1]},
        {"per_class_samples": [5, 4, 3, 2]},
        {"warnings": 3},
    ],
)
def test_what_an_evaluation_tells_in_other_types_is_one_line(
    run: Path, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(run / "evaluation.json", **changes)
    if "train_counts" in changes:
        (run / "split.json").unlink()
    assert command(run, "--no-model") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run / 'evaluation.json'}: damaged") and error.count("\n") == 1


@pytest.mark.parametrize("classes", [3, 7])
def test_an_evaluation_of_other_classes_than_those_of_its_run_is_one_line(
    run: Path, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    split = {"class_names": [*map(str, range(classes))], "train_counts": [4] * classes}
    rewrite(run / "split.json", **split)
    assert command(run, "--no-model") == 2
    told = f"{run / 'evaluation.json'}: damaged or not of reat_fast (5 classes, split.json has"
    error = capsys.readouterr().err
    assert f"{told} {classes})" in error and error.count("\n") == 1


def test_bad_input_is_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, named in [
        ((), "RUN"),
        ((tmp_path / "absent",), "absent: holds no config.json; give the folder of a run"),
        ((run, run), "run: named more than once"),
        ((run, tmp_path, "--data", run), "of several runs none is attacked; leave it out"),
        ((run, "--images", "0"), "--images 0: must be at least 1"),
        ((run, "--out", tmp_path / "report.txt"), "report.txt: must end in .html"),
        ((run, "--modell"), "--model"),
    ]:
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_all_that_is_read_of_a_run_goes_from_the_largest_class_to_the_smallest(run: Path) -> None:
    counts = [100, 10, 400, 50, 200]
    rewrite(run / "split.json", train_counts=counts)
    record = read_run(run)
    assert record.order == [2, 4, 0, 3, 1] and record.counts == [400, 200, 100, 50, 10]
    assert record.class_names == [EVIL[c] for c in record.order]
    assert record.ae_counts == [[100, 10, 400, 50, 200], [0, 0, 760, 0, 0]]
    assert record.evaluation is not None and record.evaluation["train_counts"] == record.counts
    assert record.evaluation["attacks"]["pgd20"]["per_class"] == [40.0, 20.0, 80.0, None, 60.0]


def test_a_page_that_cannot_be_written_is_named_before_the_model_is_attacked(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "_probe", pytest.fail)
    (run / "report").touch()
    for out, message in [
        (run / "config.json" / "page.html", "page.html: cannot be written (File exists)"),
        (run / "report.html", f"{run / 'report'} is a file; pictures go into a folder"),
    ]:
        assert command(run, "--out", out) == 2
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_a_page_that_another_process_is_writing_is_left_to_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(run / "report.html"):
        assert command(run, "--no-model") == 2
    assert "report.html: another process is writing it; wait for it" in capsys.readouterr().err
    assert command(run, "--no-model") == 0
    assert not list(run.glob("*.lock"))


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    run = made_run(tmp_path / "my run")
    for name in ("env.json", "split.json", "metrics.csv", "timing.csv", "evaluation.json"):
        (run / name).unlink()
    assert command(run) == 0
    page = (run / "report.html").read_text("utf-8")
    assert "0 of 2 epochs" in page and "No evaluation.json" in page
    assert f"python -m reat_fast.evaluate &#x27;{run}&#x27;" in page
    assert "No weights in the folder (best.safetensors, last.safetensors)" in page


@pytest.mark.usefixtures("undrawn")
def test_figures_of_weights_that_were_trained_since_are_left_out(run: Path) -> None:
    best = run / "best.safetensors"
    best.write_bytes(b"evaluated")
    rewrite(run / "evaluation.json", weights_sha256=weights_sha256(best))
    assert read_run(run).evaluation is not None
    best.write_bytes(b"trained on")
    assert read_run(run).evaluation is None
    assert command(run, "--no-model") == 0
    page = (run / "report.html").read_text("utf-8")
    assert "The weights were trained on since evaluation.json" in page
    assert "Not evaluated yet" in page and "70.00" not in page


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / f"s{seed}", 40.0 + seed, seed=seed) for seed in (0, 2)]
    folders += [made_run(tmp_path / "other", 30.0, lr=0.05)]
    out = tmp_path / "deep" / "together.html"
    assert command(*folders, "--out", out) == 0
    page = Tags(out.read_text("utf-8"))
    for shown in (
        "3 runs in 2 groups",
        "41.00 ± 1.41",
        "A: lr=0.1",
        "B (other): lr=0.05",
        "s2",
        "other",
    ):
        assert shown in page.text
    names = {path.stem for path in (tmp_path / "deep" / "together").glob("*.png")}
    curves = {"loss", "adv-accuracy", "eval-robust", "eval-robust-tail"}
    assert names == curves | {"classes-clean", "classes-pgd20"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    data = made_npz(folder / "made.npz", classes=5)
    arguments = ["reat", "--dataset", "npz", "--data", data, "--model", "resnet8", "--width", 8]
    arguments += ["--batch-size", 32, "--imbalance", 0.2, "--steps", 1, "--epochs", 1]
    arguments += ["--run-dir", folder / "run"]
    assert train.main([str(argument) for argument in arguments]) == 0
    return folder / "run"


def test_a_trained_run_shows_what_its_model_does(trained: Path) -> None:
    assert command(trained, "--images", 20, "--device", "cpu") == 0
    names = {path.stem for path in (trained / "report").glob("*.png")}
    assert {"examples", "confusion", "features", "accuracy", "time"} <= names
    page = (trained / "report.html").read_text("utf-8")
    assert "PGD-20, 20 test images, npz" in page
    assert len(re.findall("<svg ", page)) == len(names)


def test_data_that_the_user_named_and_that_cannot_be_read_is_an_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent, damaged = tmp_path / "absent.npz", tmp_path / "damaged.npz"
    damaged.write_bytes(b"PK")
    for data, flags in (
        (absent, []),
        (absent, ["--no-model"]),
        (damaged, []),
        (tmp_path, []),
    ):
        assert command(trained, "--data", data, "--out", tmp_path / "page.html", *flags) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --data {data}: ") and error.count("\n") == 1
        assert not (tmp_path / "page.html").exists()


def test_missing_data_leaves_a_report_that_says_so(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = trained.parent / "made.npz"
    hidden = data.rename(tmp_path / "hidden.npz")
    try:
        assert command(trained) == 0
        page = (trained / "report.html").read_text("utf-8")
        assert "Confusion, images and features are missing" in page
        assert "made.npz: no such file or folder" in page and "--data PATH" in page
        written, missing = capsys.readouterr().out.splitlines()
        assert "6 pictures" in written
        assert missing.startswith("Confusion, images and features are missing")
        assert "--data PATH" in missing
        found = probe_run(read_run(trained), 5, hidden, torch.device("cpu"))
        assert found.conditions.startswith("PGD-20, 5 test images, npz")
    finally:
        hidden.rename(data)


def test_damaged_weights_are_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((trained / "evaluation.json").read_text())
    weights = trained / told["weights"]
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    try:
        assert command(trained) == 2
    finally:
        weights.write_bytes(whole)
    error = capsys.readouterr().err
    assert f"{weights}: damaged" in error and error.count("\n") == 1


def test_data_of_another_kind_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for made, named in (
        (made_npz(tmp_path / "wide.npz", classes=6), "has 6 classes"),
        (made_npz(tmp_path / "grey.npz", classes=5, channels=1), "has 1 channels"),
    ):
        assert command(trained, "--data", made) == 2
        error = capsys.readouterr().err
        assert f"--data: npz {named}" in error and error.count("\n") == 1


def test_pictures_of_a_run_folder_are_png(trained: Path, tmp_path: Path) -> None:
    evaluation = json.loads((trained / "evaluation.json").read_text())
    pictures.draw_accuracy(evaluation, tmp_path / "accuracy.png", "title")
    curves.draw_learning(trained / "metrics.csv", tmp_path / "learning.png")
    for file in tmp_path.glob("*.png"):
        assert file.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_weights_epoch_is_told_only_where_it_is_known(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())
    del evaluation["weights_epoch"]
    known = {"weights_sha256": "of weights that are no longer there"}
    for weights, epoch in (("last.safetensors", 2), ("best.safetensors", None)):
        (run / "evaluation.json").write_text(
            json.dumps({**evaluation, **known, "weights": weights})
        )
        record = read_run(run)
        assert record.weights_epoch == epoch
        assert ("of epoch" in record.protocol) == (epoch is not None)
    rows = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(rows[:-1]))  # of a run under way they may be older
    (run / "evaluation.json").write_text(
        json.dumps({**evaluation, **known, "weights": "last.safetensors"})
    )
    assert read_run(run).weights_epoch is None

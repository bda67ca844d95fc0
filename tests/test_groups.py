"""Which runs a report averages: equal settings, training images and conditions, each seed once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import COUNTS, made_run

from reat_fast import report
from reat_fast.checkpoint import CHECKPOINT
from reat_fast.cli.command import run_command
from reat_fast.reporting.compared import compared_report
from reat_fast.reporting.groups import Group, group_runs
from reat_fast.reporting.run_record import read_run
from reat_fast.reporting.tables import paper_table


def grouped(*folders: Path) -> list[Group]:
    return group_runs([read_run(folder) for folder in folders])


def names(groups: list[Group]) -> list[list[str]]:
    return [[run.name for run in group.runs] for group in groups]


def trained_on(
    folder: Path, seed: int, settings: dict[str, Any] | None = None, **split: Any
) -> Path:
    """Write the folder of a run whose split.json says more."""
    made_run(folder, overall=40.0 + seed, seed=seed, **(settings or {}))
    told = json.loads((folder / "split.json").read_text())
    (folder / "split.json").write_text(json.dumps(told | split))
    return folder


def test_runs_trained_on_other_images_stand_apart(tmp_path: Path) -> None:
    rare = [400, 200, 100, 50, 11]
    a, a2 = (trained_on(tmp_path / f"a{k}", k, fingerprint="1" * 64) for k in (0, 1))
    b = trained_on(tmp_path / "b", 2, train_counts=rare, fingerprint="2" * 64)
    groups = grouped(a, a2, b)
    assert names(groups) == [["a0", "a1"], ["b"]]
    assert groups[0].label == "A: training images=760 (400 to 10 a class)"
    assert groups[1].label == "B (b): training images=761 (400 to 11 a class)"
    assert paper_table(groups)[2][2] == "40.50 ± 0.71"


@pytest.mark.parametrize("digest", ["fingerprint", "images_sha256"])
def test_equal_class_sizes_are_no_equal_images(digest: str, tmp_path: Path) -> None:
    a, b = (
        trained_on(tmp_path / name, k, **{"fingerprint": "0" * 64, digest: str(k) * 64})
        for k, name in enumerate("ab")
    )
    first, second = grouped(a, b)
    title = {"fingerprint": "training split"}.get(digest, "training images_sha256")
    assert first.differs == {title: "000000000000"} and second.differs == {title: "111111111111"}


def test_images_that_only_a_checkpoint_tells_apart_stand_apart(tmp_path: Path) -> None:
    folders = [trained_on(tmp_path / name, k) for k, name in enumerate("abc")]
    for folder, images in zip(folders, ("x", "x", "y"), strict=True):
        torch.save({"fingerprint": "f", "images": images}, folder / CHECKPOINT)
    assert names(grouped(*folders)) == [["a", "b"], ["c"]]


def test_older_runs_are_averaged_with_what_they_do_not_contradict(tmp_path: Path) -> None:
    new, other = (
        trained_on(tmp_path / name, k, images_sha256=name, fingerprint="f")
        for k, name in enumerate(("new", "other"))
    )
    old, bare = trained_on(tmp_path / "old", 2, fingerprint="f"), made_run(tmp_path / "bare")
    (bare / "split.json").unlink()
    assert names(grouped(new, old, bare)) == [["new", "old", "bare"]]
    assert names(grouped(old, new, other)) == [["old", "new"], ["other"]]


def test_images_that_settings_explain_are_not_named(tmp_path: Path) -> None:
    a = made_run(tmp_path / "a", imbalance=0.1)
    b = made_run(tmp_path / "b", imbalance=0.2)
    (b / "split.json").write_text((a / "split.json").read_text().replace("50", "60"))
    assert [group.differs for group in grouped(a, b)] == [
        {"imbalance": "0.1"},
        {"imbalance": "0.2"},
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"beta": 3.0}),
        ({}, {"attack_loss": "ce"}),
        ({}, {"eval_every": 5}),
        ({"attack_batchnorm": "train"}, {"attack_batchnorm": "train", "attack_loss": "rbl"}),
        ({"attack": "n-fgsm", "steps": 3}, {"attack": "n-fgsm", "start": "none"}),
        ({"evaluation": "none"}, {"evaluation": "none", "eval_every": 2, "gamma": 0.1}),
    ],
)
def test_settings_that_come_to_the_same_are_averaged(
    one: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    folders = [made_run(tmp_path / "a", **one), made_run(tmp_path / "b", seed=1, **other)]
    (group,) = grouped(*folders)
    assert len(group.values("pgd20", "overall")) == 2 and group.differs == {}


def test_a_setting_that_acts_in_one_group_alone_is_no_difference_of_its_own(tmp_path: Path) -> None:
    a = made_run(tmp_path / "a", radius="class", radius_alpha=0.4)
    b = made_run(tmp_path / "b", radius_alpha=0.2)
    assert [group.differs for group in grouped(a, b)] == [{"radius": "class"}, {"radius": "same"}]
    c = made_run(tmp_path / "c", radius="class", radius_alpha=0.1)
    groups = grouped(a, b, c)
    assert [group.differs["radius_alpha"] for group in groups] == ["0.4", "–", "0.1"]
    assert groups[1].label == "B (b): radius=same"


def test_images_that_a_setting_without_effect_does_not_explain_are_named(tmp_path: Path) -> None:
    rare = [400, 200, 100, 50, 11]
    as_is = {"imbalance_profile": "as-is"}
    a = made_run(tmp_path / "a", **as_is)
    b = made_run(tmp_path / "b", imbalance=0.2, **as_is)
    told = json.loads((b / "split.json").read_text())
    (b / "split.json").write_text(json.dumps(told | {"train_counts": rare}))
    _, second = grouped(a, b)
    assert second.differs == {"training images": "761 (400 to 11 a class)"}


def test_groups_of_a_table_are_labelled_alike_and_with_all_that_tells_them_apart(
    tmp_path: Path,
) -> None:
    a = made_run(tmp_path / "o4", radius="class", evaluation="held-out")
    b = made_run(tmp_path / "o12", evaluation="none")  # 37 characters, those of the other 42
    first, second = grouped(a, b)
    assert [first.short_label, second.short_label] == ["A (o4)", "B (o12)"]
    assert first.legend == "A (o4)" and first.label == "A (o4): radius=class, evaluation=held-out"
    made = compared_report([read_run(a), read_run(b)])
    assert [row[0] for row in made.table[1:]] == ["A (o4)", "A (o4)", "B (o12)", "B (o12)"]
    assert made.table_note.endswith(f"\n\n- {first.label}\n- {second.label}")
    for name, value in (*first.differs.items(), *second.differs.items()):
        assert name in made.page and f"<td>{value}</td>" in made.page
    long = made_run(tmp_path / "a name of over forty characters, all told", lr=0.2)
    assert [group.short_label for group in grouped(a, b, long)] == ["A", "B", "C"]


def test_pictures_name_the_presets_in_which_groups_differ(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"lr": 0.01, "nesterov": True, "awp": 0.01}
    folders = [trained_on(tmp_path / "a", 0, preset="reat")]
    folders += [made_run(tmp_path / "b", lr=0.05)]
    assert [group.legend for group in grouped(*folders)] == [
        "A (a): reat, lr=0.1",
        "B (b): lr=0.05",
    ]
    assert [group.short_label for group in grouped(*folders)] == ["A (a): lr=0.1", "B (b): lr=0.05"]
    folders += [trained_on(tmp_path / "c", 0, settings=settings, preset="at")]
    legends = [group.legend for group in grouped(*folders)]
    assert legends == ["A (a): reat", "B (b)", "C (c): at"]


def test_a_difference_in_images_is_named_beside_one_in_settings(tmp_path: Path) -> None:
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", lr=0.05)
    told = json.loads((b / "split.json").read_text())
    (b / "split.json").write_text(json.dumps(told | {"train_counts": [9, *COUNTS[1:]]}))
    _, second = grouped(a, b)
    assert second.differs == {"lr": "0.05", "training images": "369 (200 to 9 a class)"}


def test_a_seed_counts_once_and_the_terminal_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, copy = made_run(tmp_path / "first", 40.0), made_run(tmp_path / "copy", 44.0)
    other = made_run(tmp_path / "other", 42.0, seed=1)
    (group,) = grouped(first, copy, other)
    assert group.values("pgd20", "overall") == [40.0, 42.0]
    assert [(run.name, earlier.name) for run, earlier in group.repeated()] == [("copy", "first")]

    out = tmp_path / "page.html"
    words = [str(word) for word in (first, copy, "--out", out)]
    assert run_command(report.main, words) == 0
    said = f"{copy} has the settings and the seed of {first}"
    assert capsys.readouterr().out.count(said) == 1
    table = (tmp_path / "page" / "table.md").read_text()
    assert said in table and "| PGD-20 | 40.00 |" in table and "| 1 |" in table
    assert said in out.read_text() and "44.00" in out.read_text()  # in the table of runs


def test_a_seed_counts_under_each_attack_that_one_of_its_runs_was_evaluated_under(
    tmp_path: Path,
) -> None:
    first, copy = made_run(tmp_path / "first", 40.0), made_run(tmp_path / "copy", 44.0)
    told = json.loads((first / "evaluation.json").read_text())
    del told["attacks"]["pgd20"]
    (first / "evaluation.json").write_text(json.dumps(told))
    (group,) = grouped(first, copy)
    assert [group.values(name, "overall") for name in ("clean", "pgd20")] == [[70.0], [44.0]]

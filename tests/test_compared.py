"""The pictures of several runs: each figure over the name of its class, and room for all of it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from made_run import COUNTS, EVIL, made_run, rewrite

from reat_fast import report
from reat_fast.cli.command import run_command
from reat_fast.reporting.compared import compared_report
from reat_fast.reporting.compared_pictures import class_keys
from reat_fast.reporting.run_record import read_run


def dots(folders: list[Path]) -> list[dict[str, float]]:
    """Return what the picture of PGD-20 shows, by group and by the class that stands below."""
    drawn = compared_report([read_run(folder) for folder in folders]).pictures
    (axes,) = next(p for p in drawn if p.name == "classes-pgd20").figure.axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    shown = []
    for container in axes.containers:
        places, heights = (np.asarray(v, float) for v in container.lines[0].get_data())
        shown.append({names[round(x)]: y for x, y in zip(places, heights, strict=True)})
    return shown


def test_each_dot_stands_over_the_name_of_its_class(tmp_path: Path) -> None:
    classes = list("vwxyz")
    falling, rising = (made_run(tmp_path / name) for name in ("falling", "rising"))
    for folder, counts in ((falling, COUNTS), (rising, COUNTS[::-1])):
        rewrite(folder / "split.json", class_names=classes, train_counts=counts)
        rewrite(folder / "evaluation.json", class_names=classes)
    told = dict(zip(classes, [80.0, 60.0, 40.0, float("nan"), 20.0], strict=True))
    for shown in dots([falling, rising]):
        assert list(shown) == classes
        np.testing.assert_array_equal(list(shown.values()), list(told.values()))
    turned = compared_report([read_run(folder) for folder in (rising, falling)])
    assert "Classes from the largest to the smallest of A." in turned.page
    same = compared_report([read_run(falling), read_run(made_run(tmp_path / "b", lr=0.2))])
    assert "Classes from the largest" not in same.page


def test_classes_of_one_name_are_told_apart_by_their_place_in_the_data(tmp_path: Path) -> None:
    folder, names = made_run(tmp_path / "run"), ["cat", "cat", "", "cat", ""]
    rewrite(folder / "split.json", class_names=names, train_counts=[1, 5, 3, 4, 2])
    rewrite(folder / "evaluation.json", class_names=names)
    assert class_keys(read_run(folder)) == [("cat", 1), ("cat", 2), ("", 0), ("", 1), ("cat", 0)]


def test_runs_of_other_classes_have_no_picture_of_them_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = made_run(tmp_path / "one"), made_run(tmp_path / "other", dataset="npz")
    for file in ("split.json", "evaluation.json"):
        rewrite(other / file, class_names=[*EVIL[:4], "new"])
    out = tmp_path / "page.html"
    assert run_command(report.main, [str(word) for word in (one, other, "--out", out)]) == 0
    assert not list((tmp_path / "page").glob("classes-*"))
    said = f"no picture, for {other} has other classes than {one}; report them apart"
    shown = capsys.readouterr().out.splitlines()[1:]
    assert shown == [f"{name} accuracy per class: {said}" for name in ("Clean", "PGD-20")]
    assert re.sub("<[^>]*>", "", out.read_text("utf-8")).count(said) == 2


def test_the_names_of_many_groups_leave_room_for_the_pictures(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / str(k), lr=0.1 + k / 100, beta=k + 1.0) for k in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = compared_report([read_run(folder) for folder in folders])
    assert len(made.pictures) == 6
    for picture in made.pictures:
        picture.figure.canvas.draw()
        (axes,) = picture.figure.axes
        assert axes.get_position().height * picture.figure.get_figheight() > 1.5  # inches


def test_conditions_name_the_groups_that_they_are_of(tmp_path: Path) -> None:
    folders = [made_run(tmp_path / name, lr=lr) for name, lr in (("a", 0.1), ("b", 0.2))]
    folders += [made_run(tmp_path / "c", lr=0.3), made_run(tmp_path / "c-1", lr=0.3, seed=1)]
    rewrite(folders[1] / "evaluation.json", weights="last.safetensors", weights_epoch=3)
    rewrite(folders[3] / "evaluation.json", weights_epoch=1)
    runs = [read_run(folder) for folder in folders]
    shared = "cifar10, 1,000 test images, L-infinity eps 8/255, step 2/255"
    best = f"A and C: {shared}, best.safetensors of epochs 1 to 2, cuda"
    last = f"B: {shared}, last.safetensors of epoch 3, cuda"
    made = compared_report(runs)
    assert f" {best}; {last}. " in made.table_note
    assert f"Each run. {best}; {last}." in made.page
    assert (
        f"run. {shared}, best.safetensors of epoch 2, cuda. "
        in compared_report([runs[0], runs[2]]).table_note
    )


def test_a_deviation_is_spoken_of_only_where_there_is_one(tmp_path: Path) -> None:
    a, b = made_run(tmp_path / "a"), made_run(tmp_path / "b", lr=0.2)
    single = compared_report([read_run(a), read_run(b)])
    for text in (single.page, single.table_note):
        assert "Each figure is that of one run." in text and "deviation" not in text
    seeds = [read_run(a), read_run(made_run(tmp_path / "c", seed=1))]
    for text in (compared_report(seeds).page, compared_report(seeds).table_note):
        assert "Each figure" not in text and "sample standard deviation" in text
    for folder in (a, b):
        (folder / "evaluation.json").unlink()
    assert "deviation" not in compared_report([read_run(a), read_run(b)]).page


def test_spreads_end_where_accuracies_do(tmp_path: Path) -> None:
    folders = []
    for seed, figures in enumerate(([0.0, 100.0, 50, None, 1], [30.0, 70.0, 52, None, 3])):
        folders.append(made_run(tmp_path / str(seed), seed=seed))
        told = json.loads((folders[-1] / "evaluation.json").read_text())
        told["attacks"]["pgd20"]["per_class"] = figures
        (folders[-1] / "evaluation.json").write_text(json.dumps(told))
    made = compared_report([read_run(folder) for folder in folders])
    (axes,) = next(p for p in made.pictures if p.name == "classes-pgd20").figure.axes
    lines = [c.lines[2][0].get_segments() for c in axes.containers]
    ends = np.array([segment[:, 1] for segments in lines for segment in segments if len(segment)])
    sizes = {tuple(np.round(pair, 2)) for pair in ends if np.isfinite(pair).all()}
    # Means 15, 85, 51 and 2, deviations 21.21, 21.21, 1.41 and 1.41.
    assert sizes == {(0.0, 36.21), (63.79, 100.0), (49.59, 52.41), (0.59, 3.41)}

"""The table of a sweep by hand: few seeds, figures of zero, names that Markdown would obey."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from reat_fast.reporting.sweep_table import (
    Planned,
    comma_separated,
    document,
    markdown,
    summarise,
)


def write_runs(folder: Path, tails: list[float]) -> list[Path]:
    files = []
    for seed, tail in enumerate(tails):
        run = folder / f"seed{seed}"
        run.mkdir()
        (run / "timing.csv").write_text("epoch,seconds\n0,2\n1,3\n")
        facts = {"cpu": "CPU", "cpu_cores": 2, "gpus": [{"name": "GPU"}], "torch": 2, "commit": "a"}
        (run / "env.json").write_text(json.dumps(facts))
        attacks = {"pgd20": {"overall": 30.0, "tail": tail}}
        evaluation = {"dataset": "my_set", "device": "cuda:0", "attacks": attacks}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        files.append(run / "evaluation.json")
    return files


@pytest.mark.parametrize(
    ("tails", "shown", "mean", "deviation"),
    [
        ([0.0], "0.00", 0, None),
        ([0.0, 2.0], "1.00 ± 1.41", 1, 2**0.5),
        ([0, 0, 6], None, 2, 12**0.5),
    ],
)
def test_zeros_count_and_two_seeds_have_a_deviation(
    tmp_path: Path, tails: list[float], shown: str | None, mean: float, deviation: float | None
) -> None:
    planned = Planned("line", (0, 1, 2, 3, 4), ["reat", "--seed", "0"])
    row = summarise(planned, write_runs(tmp_path, tails), ["pgd20"])
    (told,) = csv.DictReader(io.StringIO(comma_separated([row])))
    assert (told["finished"], told["planned"], told["device"]) == (str(len(tails)), "5", "GPU")
    assert float(told["pgd20_tail_mean"]) == mean
    found = told["pgd20_tail_std"]
    assert found == "" if deviation is None else float(found) == pytest.approx(deviation)
    head, _, line = markdown([row]).splitlines()
    assert head.split()[-2] == "seconds" and "my\\_set" in line
    assert shown is None or f"| {shown} " in line


@pytest.mark.parametrize(
    ("samples", "uneven"), [([20, 10, 8], True), ([8, 8, 8], False), (None, False)]
)
def test_balanced_accuracy_is_shown_where_classes_differ_in_their_test_images(
    samples: list[int] | None, uneven: bool, tmp_path: Path
) -> None:
    (file,) = write_runs(tmp_path, [2.0])
    evaluation = json.loads(file.read_text())
    evaluation["attacks"]["pgd20"]["balanced"] = 12.5
    file.write_text(json.dumps(evaluation | {"per_class_samples": samples}))
    row = summarise(Planned("line", (0,), ["reat"]), [file], ["pgd20"])
    head, _, line = markdown([row]).splitlines()
    shown = dict(zip(head.split("|"), line.split("|"), strict=True))
    told = {title.strip(): cell.strip() for title, cell in shown.items() if "PGD" in title}
    balanced = {"PGD-20 balanced": "12.50"} if uneven else {}
    assert told == {"PGD-20": "30.00", **balanced, "PGD-20 tail": "2.00"}
    assert ("counts every image alike, balanced every class" in document([row])) == uneven
    (figures,) = csv.DictReader(io.StringIO(comma_separated([row])))
    assert float(figures["pgd20_balanced_mean"]) == 12.5  # the columns of a file do not change

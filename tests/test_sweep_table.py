"""The table of a sweep by hand: few seeds, figures of zero, names that Markdown would obey."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from reat_fast.reporting.sweep_table import Planned, comma_separated, markdown, summarise


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

"""Rows of measured figures: complete, appended, and never mixed with other columns."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

import pytest

from bench.records import Figure, record


def test_rows_are_appended_with_what_repeats_them(tmp_path: Path) -> None:
    for value in (1.5, 2.25):
        file = record([Figure("copy", value, 0.125, 5, "s", "[3]")], "cpu", "cmd", tmp_path)
    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["value"] for row in rows] == ["1.5", "2.25"]
    for name in ("what", "unit", "dtype", "device", "python", "torch", "date", "command"):
        assert rows[0][name]
    assert file.name == file.name.lower() and " " not in file.name


def test_repeats_are_summed_up_by_median_or_mean_and_spread() -> None:
    assert Figure.of("copy", [4.0, 1.0, 2.5], "s", "[3]") == Figure("copy", 2.5, 3.0, 3, "s", "[3]")
    mean = Figure.of("copy", [4.0, 1.0], "%", average=statistics.mean)
    assert mean == Figure("copy", 2.5, 3.0, 2, "%")
    assert Figure.of("copy", [2.0], "s", dtype="bfloat16").spread == 0


def test_a_file_of_another_version_is_left_alone(tmp_path: Path) -> None:
    file = record([Figure("copy", 1.0, 0.0, 1, "s")], "cpu", "cmd", tmp_path)
    file.write_text("what,value\n")
    with pytest.raises(ValueError, match="columns of another version"):
        record([Figure("copy", 1.0, 0.0, 1, "s")], "cpu", "cmd", tmp_path)
    assert file.read_text() == "what,value\n"

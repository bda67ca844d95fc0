"""Rows of measured figures: complete, appended, and never mixed with other columns."""

from __future__ import annotations

import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from bench import records
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


def test_a_benchmark_that_is_asked_to_end_writes_what_it_has(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Run two made benchmarks, the second of which never ends, as the suite for a GPU does."""
    root = pytestconfig.rootpath
    (tmp_path / "conftest.py").write_text((root / "bench/conftest.py").read_text())
    (tmp_path / "bench_made.py").write_text(
        "import os, signal, time\n"
        "def test_quick(benchmark, pytestconfig):\n"
        "    assert pytestconfig.getoption('keep')\n"
        "    benchmark.pedantic(lambda: None, rounds=3)\n"
        "def test_endless(benchmark):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    benchmark.pedantic(lambda: time.sleep(60))\n"
    )
    file = tmp_path / "kept.json"
    command = [sys.executable, "-m", "pytest", "bench_made.py", "--benchmark-only", "--keep"]
    command += [f"--benchmark-json={file}", "-p", "bench.stopping"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr  # as for Ctrl-C
    names = [row["name"] for row in json.loads(file.read_text())["benchmarks"]]
    assert names == ["test_quick"], done.stdout


def test_rows_of_a_program_are_no_changes_to_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[int] = []

    def environment() -> dict[str, object]:
        described.append(1)
        known: dict[str, object] = dict.fromkeys(("driver", "python", "torch", "triton"))
        return known | {"gpus": [], "cpu": "CPU", "cpu_cores": 2, "commit": "c", "dirty": False}

    monkeypatch.setattr(records, "environment", environment)
    records._facts.cache_clear()
    try:
        for _ in range(2):
            record([Figure("copy", 1.0, 0.0, 1, "s")], "cpu", "cmd", tmp_path)
    finally:
        records._facts.cache_clear()
    assert len(described) == 1

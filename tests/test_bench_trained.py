"""The evaluation of a trained network with its time: rows of figures, and a search that goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from made_data import made_npz
from made_run import made_run

from bench import bench_trained
from bench.records import Figure
from reat_fast import evaluate, train
from reat_fast.cli.command import run_command
from reat_fast.evaluation import captured, passes


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    kept: list[Figure] = []
    monkeypatch.setattr(bench_trained, "record", lambda figures, *_: kept.extend(figures))
    return kept


def test_a_trained_network_gives_its_times_and_accuracies(
    tmp_path: Path, rows: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = made_npz(tmp_path / "made.npz", classes=5), tmp_path / "run"
    small = ["reat", "--dataset", "npz", "--data", data, "--model", "resnet8", "--width", 8]
    small += ["--imbalance", 0.2, "--steps", 1, "--epochs", 1, "--batch-size", 32]
    small += ["--run-dir", run, "--device", "cpu", "--quiet"]
    assert run_command(train.main, [str(word) for word in small]) == 0
    monkeypatch.setattr(bench_trained, "LINES", (("clean", "pgd2"), ("fgsm",)))
    before = (run / "evaluation.json").read_bytes()
    arguments = [str(run), "--precision", "float32", "--subset", "20", "--device", "cpu", "--keep"]
    assert run_command(bench_trained.main, arguments) == 0
    found = {row.what: row for row in rows}
    assert list(found)[:2] == ["trained: training", "trained: clean pgd2"]
    assert found["trained: fgsm"].unit == "s" and found["trained: fgsm"].value > 0
    assert 0 <= found["trained: pgd2 overall"].value <= found["trained: clean overall"].value
    assert "resnet8, 1 epochs, 20 images" in found["trained: fgsm tail"].shape
    assert (run / "evaluation.json").read_bytes() == before


def test_a_search_that_goes_on_says_that_its_time_is_of_the_rest(
    tmp_path: Path, rows: list[Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path / "run")
    states = [run / f"autoattack-state-{key}.pt" for key in ("01234567", "89abcdef")]
    for file in states:
        file.touch()
    asked: list[Any] = []

    def evaluated(flags: list[str]) -> int:
        attacks = flags[flags.index("--attacks") + 1 : flags.index("--precision")]
        asked.append(attacks)
        if attacks == ["aa"]:
            states[0].unlink()
        figures = {attack: {"overall": 50.0, "tail": None} for attack in attacks}
        result = {"samples": 9, "seconds": 3.0, "attacks": figures}
        Path(flags[flags.index("--out") + 1]).write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(evaluate, "main", evaluated)
    assert run_command(bench_trained.main, [str(run), "--device", "cpu", "--keep"]) == 0
    assert asked == [["clean", "pgd20"], ["aa"]]
    times = {row.what: row.value for row in rows if row.unit == "s"}
    assert times == {
        "trained: training": 16.0,
        "trained: clean pgd20": 3.0,
        "trained: aa, the rest": 3.0,
    }
    assert [row.what for row in rows if row.unit == "%"] == [
        f"trained: {attack} overall" for attack in ("clean", "pgd20", "aa")
    ]


@pytest.mark.parametrize("flags", [[], ["--launched", "--batch-size", "7"]])
def test_attacks_are_launched_one_by_one_where_that_is_asked(
    tmp_path: Path, rows: list[Figure], monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    seen: list[tuple[bool, bool]] = []

    def evaluated(given: list[str]) -> int:
        seen.append((math.isinf(captured.WORTHWHILE_STEPS), math.isinf(passes.FIRST_LAUNCHES)))
        assert given[given.index("--batch-size") + 1 :][:1] == ["7"] if flags else True
        result = {"samples": 9, "seconds": 3.0, "attacks": {}}
        Path(given[given.index("--out") + 1]).write_text(json.dumps(result))
        return 0

    monkeypatch.setattr(evaluate, "main", evaluated)
    run = made_run(tmp_path / "run")
    assert run_command(bench_trained.main, [str(run), "--device", "cpu", "--keep", *flags]) == 0
    assert seen == [(bool(flags), bool(flags))] * 2
    assert not math.isinf(captured.WORTHWHILE_STEPS) and not math.isinf(passes.FIRST_LAUNCHES)
    ending = ", launched" if flags else ""
    assert [row.what for row in rows][1:] == [
        f"trained: clean pgd20{ending}",
        f"trained: aa{ending}",
    ]
    assert rows[1].shape.endswith("B=7" if flags else "B=auto")


def test_a_folder_without_a_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(bench_trained.main, [str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "none: holds no config.json; give the folder of a run" in capsys.readouterr().err

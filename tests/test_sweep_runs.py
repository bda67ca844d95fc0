"""Sweeps of real runs: trained, evaluated, gone on with, and beside each other to the same bits."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from made_data import made_npz
from made_sweep import SMALL, command, run_here, run_with


def test_a_run_of_few_batches_gets_its_attacks_on_the_images_of_its_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(run_here, monkeypatch)
    data = made_npz(tmp_path / "made.npz")
    presets, out = tmp_path / "presets.txt", tmp_path / "out"
    presets.write_text(f"small: reat {SMALL} --data {data} --limit-batches 1\n")
    file = out / "small-seed0" / "evaluation.json"
    assert command(presets, "--out", out, "--attacks", "fgsm") == 0
    found = json.loads(file.read_text())
    assert found["samples"] == 16 and set(found["attacks"]) == {"clean", "pgd20", "fgsm"}
    assert not (file.parent / "evaluation-2.json").exists()

    assert command(presets, "--out", out, "--attacks", "fgsm", "l2pgd1") == 0
    assert "| 8/255; L2 eps 128/255 |" in (out / "summary.md").read_text()

    file.write_text(json.dumps({**found, "l2_eps": 0.25}))
    assert command(presets, "--out", out, "--attacks", "fgsm", "cw1") == 0
    assert set(json.loads(file.read_text())["attacks"]) == {"clean", "pgd20", "fgsm", "cw1"}

    file.write_text(json.dumps({**found, "samples": 3}))
    assert command(presets, "--out", out, "--attacks", "fgsm", "cw2") == 1
    error = capsys.readouterr().err
    assert f"{file} still lacks cw2, for it was measured under other conditions" in error
    assert "1 of 1 runs failed: small-seed0 (exit code 1)" in error


def test_a_sweep_of_real_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_with(run_here, monkeypatch)
    data = made_npz(tmp_path / "made.npz")
    presets, out = tmp_path / "presets.txt", tmp_path / "out"
    small = f"small: reat {SMALL} --data {data}\n"
    presets.write_text(f"{small}huge: reat {SMALL} --data {data} --batch-size 9999\n")
    assert command(presets, "--out", out) == 1
    shown = capsys.readouterr()
    assert "1 of 2 runs failed: huge-seed0 (exit code 2)" in shown.err
    assert (out / "small-seed0" / "best.safetensors").exists()
    assert "| small | 1 of 1 |" in shown.out
    (out / "small-seed0" / "evaluation.json").unlink()
    presets.write_text(small)
    assert command(presets, "--out", out) == 0
    assert "--resume" in capsys.readouterr().out
    assert (out / "small-seed0" / "evaluation.json").exists()
    assert command(presets, "--out", out, "--attacks", "fgsm", "cw2", "--seeds", 0, 1) == 0
    shown = capsys.readouterr().out.splitlines()
    steps = [line.split(":")[1].split(" --")[0] for line in shown if line.startswith("[")]
    trained = " python -m reat_fast.train reat"
    evaluated = [f" python -m reat_fast.evaluate {out / f'small-seed{seed}'}" for seed in (0, 1)]
    assert steps == [evaluated[0], trained, evaluated[1]]
    with (out / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["finished"] == "2" and all(row[f"{k}_mean"] for k in ("pgd20", "fgsm", "cw2_tail"))
    assert command(presets, "--out", out, "--attacks", "cw2", "--seeds", 0, 1) == 0
    assert capsys.readouterr().out.count(": finished") == 2

    own = (out / "small-seed0" / "evaluation.json").read_text()
    other = ["--attacks", "cw2", "--subset", 12, "--precision", "bf16", "--seeds", 0, 1]
    assert command(presets, "--out", out, *other) == 0
    assert "| small | 2 of 2 | npz | 12 |" in " ".join(capsys.readouterr().out.split())
    assert (out / "small-seed0" / "evaluation.json").read_text() == own
    found = json.loads((out / "small-seed1" / "evaluation-subset12-bf16.json").read_text())
    assert found["samples"] == 12 and found["precision"] == "bf16"
    assert set(found["attacks"]) == {"clean", "pgd20", "cw2"}
    assert command(presets, "--out", out, *other) == 0
    assert capsys.readouterr().out.count(": finished") == 2
    other[1] = "fgsm"
    assert command(presets, "--out", out, *other) == 0
    assert "--attacks fgsm --eps" in capsys.readouterr().out
    more = json.loads((out / "small-seed1" / "evaluation-subset12-bf16.json").read_text())
    assert more["attacks"] == found["attacks"] | {"fgsm": more["attacks"]["fgsm"]}
    assert command(presets, "--out", out, "--subset", 0) == 2
    assert "--subset 0: must be at least 1" in capsys.readouterr().err
    assert command(presets, "--out", out, "--jobs", 0) == 2
    assert "--jobs 0: must be at least 1" in capsys.readouterr().err


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with one thread here and in programs: another number may sum in another order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_runs_beside_each_other_end_with_the_bits_of_one_after_another(
    one_thread: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = made_npz(tmp_path / "made.npz")
    presets, beside, alone = tmp_path / "presets.txt", tmp_path / "beside", tmp_path / "alone"
    huge = f"huge: reat {SMALL} --data {data} --batch-size 9999\n"
    presets.write_text(f"small: reat {SMALL} --data {data}\n{huge}")
    assert command(presets, "--seeds", 0, 1, "--jobs", 2, "--out", beside, "--attacks", "fgsm") == 1
    shown = capsys.readouterr()
    for head in ("[1/4] small-seed0", "[2/4] small-seed1"):
        log = beside / f"{head.split()[1]}.log"
        assert (
            f"{head}: python -m reat_fast.train reat " in shown.out and f" >> {log}\n" in shown.out
        )
        assert f"{head}: python -m reat_fast.evaluate " in shown.out
        assert f"{head}: finished\n" in shown.out
        assert log.read_text().count("testing on 24 images") == 1
    for head in ("[3/4] huge-seed0", "[4/4] huge-seed1"):
        assert f"{head}: exit code 2: error: --batch-size 9999: " in shown.err
    assert "2 of 4 runs failed: huge-seed0 (exit code 2), huge-seed1 (exit code 2)" in shown.err
    run_with(run_here, monkeypatch)
    assert command(presets, "--seeds", 0, 1, "--out", alone, "--attacks", "fgsm") == 1
    assert not list(alone.glob("*.log"))
    for name in ("small-seed0", "small-seed1"):
        weights = [(out / name / "best.safetensors").read_bytes() for out in (beside, alone)]
        assert weights[0] == weights[1]

    def figures(out: Path) -> list[dict[str, str]]:
        with (out / "summary.csv").open(newline="") as file:
            return [
                {k: v for k, v in row.items() if not k.startswith("seconds")}
                for row in csv.DictReader(file)
            ]

    assert figures(beside) == figures(alone)

"""The suite for a GPU, bench/gpu.py, and the clocks that it reads: what they do without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import clocks, gpu
from reat_fast.cli.command import run_command


@pytest.fixture
def fake_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put an nvidia-smi on the path whose clock is 1980 MHz and whose memory clock is hidden."""
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\necho '1980, 1980, [N/A], 512.25, 700.00, 61'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_clocks_are_read_while_something_runs(fake_smi: None) -> None:
    with clocks.watched_clocks() as readings:
        deadline = time.monotonic() + 20
        while not readings and time.monotonic() < deadline:
            time.sleep(0.01)
    found = clocks.summary(readings)
    assert found["sm_mhz"] == {"least": 1980, "median": 1980, "most": 1980}
    assert found["watts"]["median"] == 512.25 and "memory_mhz" not in found


def test_without_nvidia_smi_there_are_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with clocks.watched_clocks() as readings:
        pass
    assert readings == [] and clocks.summary(readings) == {} == clocks.read_clocks()


def test_the_suite_runs_its_parts_within_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]
    out, results = tmp_path / "out", tmp_path / "results"
    results.mkdir()
    appends = f"open({str(results / 'gpu.csv')!r}, 'w').write('a row'); print('done')"
    made = [
        gpu.Part("good", ["-c", appends], 60),
        gpu.Part("rows kept", ["-c", f"open({str(out / 'gpu.csv')!r})"], 60),
        gpu.Part("slow", sleeps[1:], 1),
        gpu.Part("ended", sleeps[1:], 60),
        gpu.Part("late", ["-c", ""], 60),
    ]
    monkeypatch.setattr(gpu, "parts", lambda options: iter(made))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"torch": "x"})
    monkeypatch.setattr(gpu, "RESULTS", results)
    arguments = ["--out", str(out), "--minutes", "0.1"]
    began = time.monotonic()
    assert run_command(gpu.main, arguments) == 1
    assert time.monotonic() - began < 30
    summary = json.loads((out / "summary.json").read_text())
    ended = {part["name"]: part["ended"] for part in summary["parts"]}
    late = {"slow": "timed out", "ended": "timed out", "late": "no time"}
    assert ended == {"good": 0, "rows kept": 0, **late}
    assert (out / "good.log").read_text() == "done\n"
    assert run_command(gpu.main, [*arguments, "--parts", "nothing"]) == 2
    assert "--parts nothing: there are good, rows kept, slow" in capsys.readouterr().err


def test_the_suite_passes_what_is_named_on(tmp_path: Path) -> None:
    options = gpu.Options(out=tmp_path, data=Path("set.npz"), official=Path("clone"))
    named = {part.name: part.arguments for part in gpu.parts(options)}
    assert list(named)[:3] == ["verify", "tests", "step"]
    for name in ("step", "epoch"):
        assert named[name][named[name].index("--official") + 1] == "clone"
    assert "--official" not in named["step-wrn"] and "set.npz" in named["training"]
    assert "training" not in {part.name for part in gpu.parts(gpu.Options(out=tmp_path))}


def test_without_a_test_tool_the_suite_says_what_that_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_installed", lambda name: name != "hypothesis")
    monkeypatch.setattr(gpu, "parts", lambda options: iter([gpu.Part("good", ["-c", ""], 60)]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"torch": "x"})
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    assert run_command(gpu.main, ["--out", str(tmp_path / "out")]) == 0
    assert "hypothesis is not installed, which costs the tests in" in capsys.readouterr().out
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert list(summary["missing"]) == ["hypothesis"]


def test_tests_run_without_limits_where_the_package_for_them_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config
) -> None:
    def arguments(name: str) -> list[str]:
        made = {part.name: part.arguments for part in gpu.parts(gpu.Options(out=tmp_path))}
        return made[name]

    monkeypatch.setattr(gpu, "_installed", lambda name: True)
    assert "--timeout=120" in arguments("tests") and "-o" not in arguments("tests")
    monkeypatch.setattr(gpu, "_installed", lambda name: name != "pytest_timeout")
    assert "--timeout=120" not in arguments("tests")
    strict = set(pytestconfig.getini("addopts"))
    assert set(gpu.LENIENT.split()) == strict - {"--strict-config"}
    # One good file and one that cannot be imported, under this project's settings.
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    (tmp_path / "test_lost.py").write_text("import no_such_package\n")
    settings = (pytestconfig.rootpath / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(settings)
    command = ["." if word == "tests" else word for word in arguments("tests")]
    command[command.index("gpu")] = "not gpu"
    done = subprocess.run(
        [sys.executable, *command, "-p", "no:timeout"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout and "1 error" in done.stdout, done.stdout + done.stderr

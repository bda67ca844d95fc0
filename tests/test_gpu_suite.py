"""The suite for a GPU, bench/gpu.py, and the clocks that it reads: what they do without one."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import clocks, gpu, gpu_parts
from reat_fast.cli.command import parse_flags, run_command
from reat_fast.training.plan import make_plan

AGAIN = {f"reat-plus-seed{seed}": 403 for seed in (1, 2)}
TRAINED = {"reat": 80, "reat-plus": 403, "at-bsl": 100, **AGAIN}
"""Name of each training of the suite, and its epochs."""


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
    (out / "run").mkdir(parents=True)
    for name in ("metrics.csv", "weights.safetensors", "weights.pt"):
        (out / "run" / name).write_text("x")
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
    with tarfile.open(out / "results.tar.gz") as packed:
        named = set(packed.getnames())
    assert {"good.log", "gpu.csv", "summary.json", "run/metrics.csv"} <= named
    assert not any("weights" in name or "results" in name for name in named)
    assert run_command(gpu.main, [*arguments, "--parts", "nothing"]) == 2
    assert "--parts nothing: there are good, rows kept, slow" in capsys.readouterr().err


def test_the_suite_passes_what_is_named_on(tmp_path: Path) -> None:
    flags = "--update-form compiled"
    options = gpu.Options(tmp_path, data=Path("set.npz"), official=Path("clone"), flags=flags)
    made = {part.name: part for part in gpu.parts(options)}
    named = {name: part.arguments for name, part in made.items()}
    assert list(named)[:3] == ["verify", "tests", "step"]
    for name in ("step", "epoch"):
        assert named[name][named[name].index("--official") + 1] == "clone"
    assert "--official" not in named["step-wrn"]
    for name in (f"train-{name}" for name in TRAINED):
        assert "set.npz" in named[name] and named[name][-2:] == flags.split()
        assert not made[name].lacks
    assert not any("official" in name for name in named)


def test_what_was_not_given_or_found_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_parts, "compute_sanitizer", lambda: None)
    lacking = {part.name: part.lacks for part in gpu.parts(gpu.Options(tmp_path)) if part.lacks}
    data, official = "no --data", "no --official"
    assert lacking == {
        "official step": official,
        **{f"{what}-{name}": data for name in TRAINED for what in ("train", "attack")},
        "official epoch": official,
        "sanitizer": "no compute-sanitizer",
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"torch": "x"})
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "none")
    out = tmp_path / "out"
    assert run_command(gpu.main, ["--out", str(out), "--parts", *lacking]) == 0
    shown = capsys.readouterr().out
    found = json.loads((out / "summary.json").read_text())["parts"]
    assert {part["name"]: part["ended"] for part in found} == lacking
    for name, lacks in lacking.items():
        assert f"{name}: {lacks}" in shown and f"{name:16} {lacks:>20}" in shown
    # A later call in the same folder keeps what the summary has of earlier ones.
    assert run_command(gpu.main, ["--out", str(out), "--minutes", "0"]) == 1
    found = json.loads((out / "summary.json").read_text())["parts"]
    ended = {part["name"]: part["ended"] for part in found}
    first = [part.name for part in gpu.parts(gpu.Options(out)) if part.call == 1]
    assert set(ended) == {*lacking, *first} and len(found) == len(ended)
    assert ended["verify"] == "no time" and ended["sanitizer"] == "no compute-sanitizer"


def test_the_parts_of_a_call_should_fit_its_time(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    documented = (pytestconfig.rootpath / "docs/measuring.md").read_text("utf-8")
    options = gpu.Options(tmp_path, data=Path("set.npz"), official=Path("clone"))
    made = list(gpu.parts(options))
    assert len({part.name for part in made}) == len(made)
    for call in (1, 2, 3, 4, 5, 6):
        own = [part for part in made if part.call == call]
        assert all(0 < part.estimate < part.seconds for part in own)
        together = sum(part.estimate for part in own)
        assert 0 < together <= 60 * options.minutes and f"| {together} |" in documented
        assert all(f"{part.name} {part.estimate}" in documented for part in own)
    assert [part.call for part in made] == sorted(part.call for part in made)
    assert {part.name for part in made if part.call == 1} == {
        *("verify", "tests", "step", "evaluation", "train-reat")
    }


def test_a_training_goes_on_and_a_trained_network_is_attacked(tmp_path: Path) -> None:
    def arguments(name: str) -> list[str]:
        (part,) = [part for part in gpu.parts(options) if part.name == name]
        return [part.lacks] if part.lacks else part.arguments

    options = gpu.Options(tmp_path, data=Path("set.npz"))
    for name in TRAINED:
        folder = tmp_path / f"run-{name}"
        assert arguments(f"attack-{name}") == ["no trained network"]
        assert "--resume" not in arguments(f"train-{name}")
        folder.mkdir()
        (folder / "checkpoint-last.pt").touch()
        assert arguments(f"train-{name}")[-2:] == ["--resume", str(folder)]
        (folder / "evaluation.json").touch()
        assert str(folder) in arguments(f"attack-{name}")


def test_make_passes_what_is_named_on(pytestconfig: pytest.Config) -> None:
    def printed(*given: str) -> str:
        command = ["make", "--no-print-directory", "-n", "gpu", "python=p", *given]
        root = pytestconfig.rootpath
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.replace("\\\n", " ").split())

    assert printed("DATA=", "OFFICIAL=", "CALL=") == "p -m bench.gpu --out gpu-results"
    given = printed("DATA=a b.npz", "OFFICIAL=clone", "CALL=2")
    assert given.endswith('gpu-results --call 2 --data "a b.npz" --official "clone"')


def test_every_part_is_asked_what_its_program_knows(tmp_path: Path) -> None:
    options = gpu.Options(tmp_path, data=Path("set.npz"), official=Path("clone"))
    checked = []
    for part in gpu.parts(options):
        module = part.arguments[1]
        if module.startswith("bench."):
            flags: Any = importlib.import_module(module).Options
            parse_flags(flags, part.arguments[2:], module)
            checked.append(part.name)
        elif module == "reat_fast.train":
            config = make_plan(part.arguments[2:]).config
            assert config.epochs == TRAINED[part.name.removeprefix("train-")]
            checked.append(part.name)
    assert len(checked) == 20, checked


def test_a_part_at_its_limit_may_write_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    polite = "\n".join(
        [
            "import time",
            "from bench.stopping import Stopped, stoppable",
            "try:",
            "    with stoppable():",
            "        print('begun', flush=True)",
            "        time.sleep(60)",
            "except Stopped:",
            "    print('rows kept')",
        ]
    )
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {deaf!r}])"
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    began = time.monotonic()
    for name, program in (("polite", polite), ("deaf", deaf), ("worker", worker)):
        part = gpu.Part(name, ["-c", program], 5 if name == "polite" else 1)
        assert gpu._run(part, tmp_path, 60, {**os.environ}).ended == "timed out"
    assert time.monotonic() - began < 30
    assert (tmp_path / "polite.log").read_text() == "begun\nrows kept\n"


def test_a_suite_that_is_asked_to_end_ends_its_part_and_keeps_its_summary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    made = [gpu.Part("good", ["-c", ""], 60), gpu.Part("asks", ["-c", asks], 60)]
    monkeypatch.setattr(gpu, "parts", lambda options: iter(made))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "environment", lambda: {"torch": "x"})
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "none")
    began = time.monotonic()
    assert run_command(gpu.main, ["--out", str(tmp_path / "out")]) == 143
    assert time.monotonic() - began < 30
    found = json.loads((tmp_path / "out/summary.json").read_text())["parts"]
    assert [part["name"] for part in found] == ["good"]


def test_without_a_test_tool_the_suite_says_what_that_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "installed", lambda name: name != "hypothesis")
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

    monkeypatch.setattr(gpu_parts, "installed", lambda name: True)
    assert {"--timeout=120", "-n"} <= set(arguments("tests")) and "-o" not in arguments("tests")
    monkeypatch.setattr(
        gpu_parts, "installed", lambda name: name not in ("pytest_timeout", "xdist")
    )
    assert "--timeout=120" not in arguments("tests")
    strict = set(pytestconfig.getini("addopts"))
    assert set(gpu_parts.LENIENT.split()) == strict - {"--strict-config", "--strict-markers"}
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
        env={**os.environ, "PYTHONPATH": str(pytestconfig.rootpath)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 passed" in done.stdout and "1 error" in done.stdout, done.stdout + done.stderr

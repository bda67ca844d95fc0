"""compute-sanitizer around the kernels' tests: where it is found, and what it is given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, sanitizer


@pytest.mark.parametrize("place", ["path", "toolkit", "package", "nowhere"])
def test_compute_sanitizer_is_found_where_it_may_be(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {
        "path": tmp_path / "path",
        "toolkit": tmp_path / "local/cuda-13.0/bin",
        "package": tmp_path / "nvidia/cu13/bin",
    }
    if place in folders:
        folders[place].mkdir(parents=True)
        tool = folders[place] / "compute-sanitizer"
        tool.write_text('#!/bin/sh\necho "$1 $2"\n')
        tool.chmod(0o755)
    (tmp_path / "nvidia").mkdir(exist_ok=True)
    for name in list(sys.modules):
        if name == "nvidia" or name.startswith("nvidia."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setenv("PATH", str(folders["path"]))
    monkeypatch.setattr(sanitizer, "TOOLKITS", tmp_path / "local")
    found = sanitizer.compute_sanitizer()
    if place == "nowhere":
        assert found is None
        return
    assert found is not None
    assert Path(found[0]) == folders[place] / "compute-sanitizer"
    part = gpu.Part("sanitizer", ["-c", ""], 60, under=found)
    assert gpu._run(part, tmp_path, 60, {}).command.startswith("compute-sanitizer --tool memcheck")
    assert (tmp_path / "sanitizer.log").read_text() == "--tool memcheck\n"


def test_the_sanitizer_takes_tests_of_every_kernel(pytestconfig: pytest.Config) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    command += ["-m", "gpu", "-k", sanitizer.TESTS, *sanitizer.FILES, *sanitizer.SINGLE]
    done = subprocess.run(
        command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True
    )
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    assert {
        line.split("::")[0] for line in tests if line.split("[")[0] not in sanitizer.SINGLE
    } == set(sanitizer.FILES)
    assert {line.split("[")[0] for line in tests} >= set(sanitizer.SINGLE)
    assert 60 < len(tests) < 240

"""What `python -m reat_fast.env` says of versions and devices, and what it keeps to itself."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reat_fast import env

SMI = """#!/bin/sh
echo 'GPU-aaaa, 580.65.06, 700.00'
echo 'GPU-bbbb, 580.65.06, [N/A]'
"""


def fake_gpus(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    gpus = [
        SimpleNamespace(name="GPU X", total_memory=80 * 2**30, major=9, minor=0, uuid=uuid)
        for uuid in uuids
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)


def fake_smi(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str = SMI) -> None:
    (folder / "nvidia-smi").write_text(script)
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_versions_are_those_in_use_and_survive_json() -> None:
    values = env.environment()
    assert values["torch"] == torch.__version__
    assert values["numpy"] == np.__version__
    assert values["python"] == platform.python_version()
    assert values["cpu"] and isinstance(values["cpu_cores"], int) and values["cpu_cores"] >= 1
    assert json.loads(json.dumps(values)) == values


def test_nothing_names_the_user_the_host_a_path_or_a_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOGNAME", "some-person")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = json.dumps(env.environment())
    assert platform.node() not in re.findall(r"[\w.-]+", text)
    for private in ("some-person", "hf_secret", str(Path(env.__file__).parent)):
        assert private not in text


def test_missing_tools_leave_gaps_and_raise_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    values = env.environment()
    assert values["commit"] is None and values["dirty"] is None and values["driver"] is None


def test_a_broken_nvidia_smi_is_as_good_as_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_smi(monkeypatch, tmp_path, "#!/bin/sh\necho 'Failed to initialize NVML'\nexit 9\n")
    assert env.environment()["driver"] is None


def test_power_limits_find_their_gpu_whatever_the_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_smi(monkeypatch, tmp_path)
    fake_gpus(monkeypatch, "cccc", "bbbb", "aaaa")
    values = env.environment()
    gpus = values["gpus"]
    assert isinstance(gpus, list)
    assert [gpu["power_limit_watts"] for gpu in gpus] == [None, None, 700.0]
    assert values["driver"] == "580.65.06"
    assert gpus[0]["name"] == "GPU X"
    assert gpus[0]["memory_gib"] == 80.0
    assert gpus[0]["compute_capability"] == "9.0"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_knows_its_commit_and_whether_it_was_changed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ("git", "-C", str(tmp_path), *identity, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--no-verify", "--message", "first")
    monkeypatch.setattr(env, "__file__", str(tmp_path / "reat_fast" / "env.py"))
    clean = env.environment()
    assert clean["commit"] == git("rev-parse", "HEAD") and clean["dirty"] is False
    (tmp_path / "changed").touch()
    assert env.environment()["dirty"] is True


def test_a_repository_around_an_installed_package_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(env, "__file__", str(tmp_path / "site-packages" / "reat_fast" / "env.py"))
    assert env.environment()["commit"] is None


def test_the_table_has_a_line_for_each_value_and_each_gpu() -> None:
    values = {"cuda": None, "dirty": False, "extras": {"timm": "1.0"}, "gpus": [{"name": "X"}] * 2}
    assert env.table(values).splitlines() == [
        "cuda        none",
        "dirty       no",
        "extras      timm 1.0",
        "gpus        name X",
        "gpus        name X",
    ]


def test_the_command_prints_a_table_or_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["env"])
    env.main()
    assert f"torch       {torch.__version__}\n" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["env", "--json"])
    env.main()
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_a_flag_that_does_not_exist_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["env", "--jsn"])
    with pytest.raises(SystemExit) as stop:
        env.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error == "error: unrecognized arguments: --jsn (--help lists every flag)\n"

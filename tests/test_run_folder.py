"""The folder of a run: which one a run takes, and which it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from reat_fast.checkpoint import CheckpointError
from reat_fast.training.run_folder import make_folder, new_run_dir


def test_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_run_dir(None, "reat") == Path("runs/reat-1")
    Path("runs/reat-1").mkdir(parents=True)
    assert new_run_dir(None, "reat") == Path("runs/reat-2")
    assert new_run_dir(Path("runs/reat-1"), "reat") == Path("runs/reat-1")
    Path("runs/reat-1/config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--run-dir runs/reat-1: .* --resume runs/reat-1"):
        new_run_dir(Path("runs/reat-1"), "reat")
    Path("file").touch()
    with pytest.raises(CheckpointError, match="--run-dir file"):
        new_run_dir(Path("file"), "reat")


def test_a_folder_that_another_run_took_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = [new_run_dir(None, "reat") for _ in range(3)]
    made = [make_folder(folder, numbered="reat") for folder in chosen]
    assert made == [Path("runs/reat-1"), Path("runs/reat-2"), Path("runs/reat-3")]
    assert make_folder(made[0]) == made[0]
    Path("runs/reat-4").symlink_to("of a disk that is gone")
    assert make_folder(chosen[0], numbered="reat") == Path("runs/reat-5")

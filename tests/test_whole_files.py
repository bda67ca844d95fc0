"""Files that are whole or not there: a failure leaves what was there before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reat_fast.storage import whole_files


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    whole_files.write_text(file, "old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        whole_files.write_atomically(file, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]
    assert file.read_text() == "old"


def test_writing_a_file_does_not_load_torch() -> None:
    code = "import sys, reat_fast.storage.whole_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_place_that_is_being_filled_is_refused_to_others(tmp_path: Path) -> None:
    target = tmp_path / "set.npz"
    for _ in range(2):
        with whole_files.replacing(target, ()) as place:
            place.write_text("ours")
            with (
                pytest.raises(OSError, match=r"set\.npz: another process is writing it; wait"),
                whole_files.replacing(target, ()),
            ):
                raise AssertionError("filled twice")
            assert place.read_text() == "ours"
        assert target.read_text() == "ours"
        assert [file.name for file in tmp_path.iterdir()] == ["set.npz"]


def test_a_lock_that_its_holder_removed_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, lock = tmp_path / "set.npz", tmp_path / "set.npz.lock"
    opened = os.open

    def removed(path: Path, *rest: int) -> int:
        descriptor = opened(path, *rest)
        lock.unlink()  # by the process that held it, before this one takes it
        return descriptor

    monkeypatch.setattr(os, "open", removed)
    with pytest.raises(OSError, match="another process"), whole_files.replacing(target, ()):
        raise AssertionError("filled")
    assert not list(tmp_path.iterdir())

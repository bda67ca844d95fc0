"""Files that are whole or not there: a failure leaves what was there before."""

from __future__ import annotations

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

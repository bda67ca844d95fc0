"""No file and no flag does more than be refused in one line: the short form of tests/fuzz.py."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fuzz
import pytest
from fuzz import Fault, check
from fuzz_targets import TARGETS, Target, seeds

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="reads /proc/self, which Linux has"
)
CASES = 60  # a target; `python -m tests.fuzz --cases 10000` is the long form


@pytest.mark.parametrize("name", TARGETS)
def test_whole_seeds_are_read_and_the_others_refused(name: str, tmp_path: Path) -> None:
    for title, content in seeds(name).items():
        folder = tmp_path / title
        (folder / TARGETS[name].file).parent.mkdir(parents=True)
        assert check(TARGETS[name], content, folder) == title.startswith("whole"), title


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_are_read_soundly_or_refused_in_one_line(name: str) -> None:
    assert fuzz.fuzz(name, CASES) < CASES


def refusing(message: str) -> Callable[[Path, bytes], object]:
    def read(path: Path, content: bytes) -> None:
        raise ValueError(message.format(path=path))

    return read


def failing(path: Path, content: bytes) -> None:
    {}["absent"]


def wrong(path: Path, content: bytes) -> None:
    assert content == b"other"


def slow(path: Path, content: bytes) -> None:
    try:
        time.sleep(60)
    except Exception:  # as a reader that takes anything for damage would
        raise ValueError(path) from None


def greedy(path: Path, content: bytes) -> None:
    assert content * (2 * fuzz.MEMORY_BYTES // len(content))


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (refusing("{path}: first\nsecond"), "more than one line"),
        (refusing("damaged"), "names no file"),
        (failing, "KeyError"),
        (wrong, "AssertionError"),
        (slow, "took more than"),
        (greedy, "took .* MiB"),
    ],
)
def test_whatever_is_no_refusal_is_a_fault(
    read: Callable[[Path, bytes], object],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fuzz, "SECONDS", 0.2 if read is slow else 60)
    monkeypatch.setattr(fuzz, "MEMORY_BYTES", 1 << 27)
    with pytest.raises(Fault, match=named):
        check(Target("file", read), b"content", tmp_path)
    assert not check(Target("file", refusing("{path}: damaged")), b"content", tmp_path)


def test_the_long_form_counts_cases_and_keeps_what_breaks_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--engine", "hypothesis", "--found", str(tmp_path), "--targets", "idx", "config"]
    assert fuzz.main([*arguments, "--cases", "20"]) == 0
    assert capsys.readouterr().out.endswith("20 cases, 0 faults\n")
    monkeypatch.setitem(TARGETS, "idx", Target("file", failing))
    assert fuzz.main([*arguments, "--cases", "20"]) == 1
    assert "idx: KeyError" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["idx-fault"]


BREAKING = """
import fuzz
from fuzz_targets import TARGETS, Target

TARGETS["idx"] = Target("file", lambda path, content: {}["absent"])
fuzz.main(["--only-here", "--cases", "20", "--targets", "idx", "--found", "."])
"""


def test_coverage_guides_the_long_form_where_atheris_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("atheris", reason="needs atheris")
    arguments = ["--engine", "auto", "--found", str(tmp_path / "found"), "--targets", "idx"]
    assert fuzz.main([*arguments, "--cases", "20"]) == 0
    assert "idx: 20 cases, atheris, " in capsys.readouterr().out
    assert list((tmp_path / "found").iterdir()) == []
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", BREAKING]
    broken = subprocess.run(command, cwd=tmp_path, env=place, capture_output=True, text=True)
    assert broken.returncode != 0
    assert "Fault: KeyError" in broken.stdout + broken.stderr
    assert [file.name[:10] for file in tmp_path.glob("idx-*")] == ["idx-crash-"]

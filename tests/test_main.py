"""The commands by their names: python -m reat_fast, and reat-fast."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import reat_fast as package
from reat_fast.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent


def reat_fast(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "reat_fast", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)


def test_every_command_is_listed() -> None:
    runs = [f.stem for f in (ROOT / "reat_fast").glob("*.py") if '"__main__"' in f.read_text()]
    assert sorted([*COMMANDS, "__main__"]) == sorted(runs)
    for arguments in ((), ("--help",), ("-h",)):
        listed = reat_fast(*arguments)
        assert listed.returncode == 0 and not listed.stderr
        assert [line.split()[0] for line in listed.stdout.splitlines()[2:]] == list(COMMANDS)


def test_the_version_is_that_of_the_installed_package() -> None:
    try:
        installed = metadata.version("reat-fast")
    except metadata.PackageNotFoundError:
        installed = package.__version__  # of a checkout on PYTHONPATH
    assert reat_fast("--version").stdout == f"reat-fast {installed}\n"
    assert package.__version__ == installed


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("trian",), 2, "error: no command 'trian'; did you mean train? (train, evaluate,"),
        (("--fused",), 2, "error: no command '--fused' (train, evaluate,"),
        (("train", "--epcohs", "3"), 2, "error: Unrecognized options: --epcohs"),
        (("data", "mnist"), 2, "mnist"),
    ],
)
def test_a_command_gets_its_flags_and_gives_its_code(
    arguments: tuple[str, ...], code: int, said: str
) -> None:
    done = reat_fast(*arguments)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr


def test_a_command_does_what_it_does_by_its_own_name() -> None:
    alone = [sys.executable, "-m", "reat_fast.data", "--list"]
    expected = subprocess.run(alone, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert reat_fast("data", "--list").stdout == expected.stdout

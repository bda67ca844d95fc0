"""What the commands write to a pipe, and to a terminal that wants no colours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from made_data import made_npz

from reat_fast import evaluate, train
from reat_fast.cli.command import run_command
from reat_fast.cli.terminal import counted, first_line, some

SMALL = ["--dataset", "npz", "--model", "resnet8", "--width", "8", "--imbalance", "1"]
SMALL += ["--epochs", "1", "--steps", "1", "--batch-size", "16", "--limit-batches", "1"]


@pytest.mark.parametrize("terminal", [False, True], ids=["pipe", "terminal without colours"])
def test_the_commands_write_no_escape_sequence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    terminal: bool,
) -> None:
    # A terminal that could show colours: what keeps them away is NO_COLOR, or that it is a pipe.
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if terminal:
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    data, folder = made_npz(tmp_path / "made.npz", train=10, test=2), str(tmp_path / "run")
    for main, arguments, code in (
        (train.main, ["reat", *SMALL, "--data", str(data), "--run-dir", folder], 0),
        (train.main, ["--resume", folder, "--lr", "9"], 2),
        (train.main, ["reat", "--learning-rate", "9"], 2),
        (evaluate.main, [folder, "--attacks", "clean", "pgd2"], 0),
        (evaluate.main, [folder, "--attacks", "none"], 2),
    ):
        assert run_command(main, arguments) == code
        shown = capsys.readouterr()
        assert shown.err if code else shown.out
        assert "\x1b" not in shown.out + shown.err, arguments
    for main in (train.main, evaluate.main):
        with pytest.raises(SystemExit):
            run_command(main, ["--help"])
        shown = capsys.readouterr()
        assert "--batch-size" in shown.out and "\x1b" not in shown.out + shown.err


COMMAND = (
    "import sys; from reat_fast.cli.command import run_command\n"
    "def main(arguments):\n    {body}\n    return 0\n"
    "sys.exit(run_command(main, []))"
)


def silent_end(command: list[str]) -> int:
    """Start a program whose output nobody reads, and return its exit code."""
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(command, text=True, env=buffered, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.close()
        _, error = process.communicate("\n", timeout=100)
    assert error == ""
    code: int = process.returncode
    return code


@pytest.mark.parametrize("body", ["print('line\\n' * 100_000)", "input(); print('a line')"])
def test_a_command_whose_reader_has_enough_ends_in_silence(body: str) -> None:
    command = [sys.executable, "-c", COMMAND.format(body=body)]
    assert silent_end(command) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("arguments", [["env"], ["env", "--json"], ["data", "--list"]])
def test_so_do_the_small_commands(arguments: list[str]) -> None:
    command = [sys.executable, "-m", f"reat_fast.{arguments[0]}", *arguments[1:]]
    assert silent_end(command) == 128 + signal.SIGPIPE


def test_another_pipe_that_breaks_is_named() -> None:
    command = [sys.executable, "-c", COMMAND.format(body="raise BrokenPipeError(32, 'a log')")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2 and ended.stderr == "error: [Errno 32] a log\n"


@pytest.mark.parametrize("closed", [1, 2])
@pytest.mark.parametrize("command", ["train", "env"])
def test_a_command_works_with_an_output_closed(closed: int, command: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", f"reat_fast.{command}"]
    if command == "train":
        data = made_npz(tmp_path / "made.npz", train=10, test=2)
        words += ["reat", *SMALL, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    shell = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *words]
    ended = subprocess.run(shell, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    if command == "train":
        assert (tmp_path / "run" / "evaluation.json").is_file()


def test_a_training_whose_reader_has_enough_ends_in_silence(tmp_path: Path) -> None:
    data = made_npz(tmp_path / "made.npz", train=10, test=2)
    command = [sys.executable, "-m", "reat_fast.train", "reat", *SMALL, "--data", str(data)]
    assert silent_end([*command, "--run-dir", str(tmp_path / "run")]) == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("main", "given", "named"),
    [
        (train.main, ["reat", "--run-dir", ""], "--run-dir"),
        (train.main, ["reat", "--run-dir=", "--epochs", "1"], "--run-dir"),
        (evaluate.main, ["", "--attacks", "clean"], "an argument"),
    ],
)
def test_an_empty_argument_is_no_folder(
    main: Callable[[list[str]], int],
    given: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(main, given) == 2
    expected = f"error: {named}: is empty, as a variable that is not set; give a value\n"
    assert capsys.readouterr().err == expected


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("reat_fast.data", "--list"), ("reat_fast",)])
def test_an_output_that_is_full_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=100,
        )
    expected = "error: the output cannot be written (No space left on device); send it elsewhere\n"
    assert (ended.returncode, ended.stderr) == (2, expected)


def test_an_error_is_told_by_its_first_line_or_by_its_kind() -> None:
    assert first_line(RuntimeError("CUDA error\n  at kernel.cu:3")) == "CUDA error"
    assert first_line(AssertionError()) == first_line(AssertionError("\n")) == "AssertionError"


def test_many_things_are_named_in_few_words() -> None:
    named = [some("abc"), some("abcd"), some("abc", 2)]
    assert named == ["a, b, c", "a, b, c and 1 more", "a, b and 1 more"]
    assert [counted(n, "epoch") for n in (0, 1, 2000)] == ["0 epochs", "1 epoch", "2,000 epochs"]

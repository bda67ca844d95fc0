"""What the tests of sweeps share: the command, small runs, programs that run in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from reat_fast import evaluate, sweep, train
from reat_fast.cli.command import run_command
from reat_fast.training import sweep_programs

SMALL = "--dataset npz --model resnet8 --width 8 --imbalance 0.1 --batch-size 16 --steps 1"
SMALL += " --held-out 0.1 --epochs 1 --device cpu"


def command(*arguments: object) -> int:
    return run_command(sweep.main, [str(argument) for argument in arguments])


class Done:
    """A program that has ended."""

    def __init__(self, code: int) -> None:
        self.wait = lambda: code


def run_with(program: Callable[[Sequence[str]], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a sweep would start run in this process, one at a time."""
    monkeypatch.setattr(sweep_programs, "begin", lambda command, *_: Done(program(command)))


def run_here(command: Sequence[str]) -> int:
    """Run a program of a sweep in this process, without the seconds of starting one."""
    modules = {"reat_fast.train": train, "reat_fast.evaluate": evaluate}
    return run_command(modules[command[2]].main, list(command[3:]))

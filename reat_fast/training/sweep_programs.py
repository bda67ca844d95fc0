"""Programs that run beside each other, each on its share of the machine, and are stopped together.

Each stands in a session of its own, and what would end this process is passed on to all of them
once: they end between two steps, with everything saved. On Linux so they do when it is killed.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from reat_fast.cli.terminal import one_line
from reat_fast.engine.stopping import Interrupted, ending_signals
from reat_fast.env import cpu_cores

STOPPED = (129, 130, 143, -signal.SIGHUP, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a program that was told to stop, by this one or by another."""


class Programs:
    """Run up to `jobs` programs at a time, known by their names; a context for the signals."""

    def __init__(self, jobs: int = 1) -> None:
        self._jobs = jobs
        self._free = list(range(jobs))
        self._running: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
        self._ended: queue.SimpleQueue[tuple[str, int]] = queue.SimpleQueue()
        self._stop: KeyboardInterrupt | None = None

    def __enter__(self) -> Programs:
        numbers = (signal.SIGINT, *ending_signals())
        self._before = {number: signal.signal(number, self._pass_on) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        # An error of this program, too, leaves none behind that nobody waits for.
        if self._stop is None:
            self._tell_all(signal.SIGTERM)
        while self._running:
            self._take()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def has_room(self) -> bool:
        """Whether another program may be started now."""
        return bool(self._free) and self._stop is None

    @property
    def busy(self) -> bool:
        """Whether any program runs."""
        return bool(self._running)

    def start(self, name: str, command: Sequence[str], log: Path | None, gpu: bool = True) -> None:
        """Start a program, with what it prints added to a file, or shown where there is none.

        gpu: whether it may be given one of several GPUs.
        """
        slot = self._free.pop(0)
        environment = share_of(slot, self._jobs, gpu, os.environ)
        program = begin(command, log, environment)
        self._running[name] = slot, program
        if self._stop is not None:  # since it was asked whether there is room
            program.send_signal(signal.SIGTERM)
        # Python waits for any one program in a thread alone; this one's is free for signals.
        threading.Thread(
            target=lambda: self._ended.put((name, program.wait())), daemon=True
        ).start()

    def wait(self) -> tuple[str, int]:
        """Wait for the next program that ends; return its name and its exit code.

        Errors: KeyboardInterrupt where the user stopped one or all of them, after all have ended.
        """
        if self._stop is not None and not self._running:
            raise self._stop
        name, code = self._take()
        if code in STOPPED and self._stop is None:
            by_hand = code in (130, -signal.SIGINT)
            self._stop = KeyboardInterrupt() if by_hand else Interrupted()
            self._tell_all(signal.SIGTERM)
        if self._stop is not None:
            while self._running:
                self._take()
            raise self._stop
        return name, code

    def _take(self) -> tuple[str, int]:
        name, code = self._ended.get()
        slot, _ = self._running.pop(name)
        self._free = sorted([*self._free, slot])
        return name, code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if self._stop is None:
            self._stop = KeyboardInterrupt() if number == signal.SIGINT else Interrupted(number)
            self._tell_all(signal.SIGTERM if number == signal.SIGHUP else number)

    def _tell_all(self, number: int) -> None:
        for _, program in self._running.values():
            program.send_signal(number)


def begin(
    command: Sequence[str], log: Path | None, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own; on Linux it ends with the thread that calls this."""
    if sys.platform == "linux":
        launch = [sys.executable, "-m", "reat_fast.training.sweep_launch"]
        command = [*launch, str(os.getpid()), *command]
    settings: dict[str, Any] = {"env": dict(environment), "start_new_session": True}
    if log is None:
        return subprocess.Popen(command, **settings)
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, **settings)


def what_ended(log: Path, logged: int) -> str:
    """Return the line by which a program tells what ended it: its last error, else its last line.

    logged: bytes that its log had before it began, which are of others.
    """
    with log.open("rb") as file:
        file.seek(logged)
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return one_line((errors or lines or [f"{log} holds nothing of it"])[-1])


def share_of(slot: int, jobs: int, gpu: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the program in a slot, 0 to jobs - 1: one GPU and some threads.

    One program alone has the whole machine, and what the user set stays: CUDA_VISIBLE_DEVICES is
    what is shared out, OMP_NUM_THREADS is what each gets.
    """
    if jobs == 1:
        return dict(environment)
    own = {"OMP_NUM_THREADS": str(max(1, (cpu_cores() or 1) // jobs)), **environment}
    named = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = [str(n) for n in range(torch.cuda.device_count())] if named is None else named.split(",")
    if gpu and len(gpus) > 1:
        own["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)].strip()
    return own

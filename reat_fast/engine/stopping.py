"""What Ctrl-C, a scheduler's SIGTERM and a closed terminal turn into.

A training ends between two steps (StopRequest), all else where it is (ended_by_sigterm).
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from reat_fast.engine.distributed import World

# Processes must agree on the step after which they stop; asking costs one small collective.
AGREE_EVERY_STEPS = 10


class Stopped(Exception):
    """The run was asked to stop, and whoever catches this saves; code: exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped by signal {code - 128}")
        self.code = code


def ending_signals() -> list[signal.Signals]:
    """Return what asks a program to end: SIGTERM, and SIGHUP of a closed terminal but for nohup."""
    hangup: signal.Signals | None = getattr(signal, "SIGHUP", None)  # which Windows lacks
    if hangup is None or signal.getsignal(hangup) == signal.SIG_IGN:
        return [signal.SIGTERM]
    return [signal.SIGTERM, hangup]


class StopRequest:
    """Notice SIGINT and ending_signals() while the block runs; a second SIGINT ends the program."""

    def __init__(self, world: World | None = None) -> None:
        self._world = world or World()
        self._signal = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *ending_signals()):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self._signal != 0

    def agreed(self, step: int) -> bool:
        """Say after step number `step` whether all processes stop here."""
        if self._world.size > 1 and step % AGREE_EVERY_STEPS:
            return False
        return self._world.any(self.asked)

    def stopped(self) -> Stopped:
        """Make the exception that ends the run."""
        return Stopped(128 + (self._signal or signal.SIGTERM))

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._signal and self._world.main:
            again = "; press Ctrl-C again to stop at once" if number == signal.SIGINT else ""
            with contextlib.suppress(OSError):  # the terminal may be gone
                print(f"stopping as soon as this is saved{again}", file=sys.stderr, flush=True)
        self._signal = number


class Interrupted(KeyboardInterrupt):
    """What SIGTERM raises within ended_by_sigterm; number: the signal, where it is another."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code of a program that a signal ended."""
    return 128 + (interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let a scheduler's SIGTERM end the block as Ctrl-C does, with all that is said and kept then.

    So does SIGHUP, see ending_signals. A second one, which timeout(1) sends at once, does not end
    that. Only the main thread can; others leave signals as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = ending_signals()

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

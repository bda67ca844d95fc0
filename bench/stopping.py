"""Ending a measurement early: the first SIGTERM becomes an exception, and what is known is kept."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 128 + signal.SIGTERM
"""Exit code of a program that was asked to end."""


class Stopped(BaseException):
    """The program was asked to end; no Exception, for compilers catch all of these."""


class Stop:
    """Whether the program was asked to end; what raises Stopped may have raised something else."""

    asked = False

    def finish(self) -> None:
        """Ignore SIGTERM from here on: only writing is left."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Raise Stopped in the block at the first SIGTERM, and ignore later ones until it ends."""
    stop = Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        stop.asked = True
        stop.finish()
        raise Stopped

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)


def pytest_configure() -> None:
    """Let SIGTERM end pytest as Ctrl-C does, with what it has: for -p bench.stopping."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)

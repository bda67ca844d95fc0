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


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise Stopped in the block at the first SIGTERM, and ignore later ones until it ends."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""What a sweep starts on Linux: a process that becomes one of its programs and ends with it.

A sweep that was killed (kill -9, out of memory) tells its programs nothing, and in sessions of
their own they would go on unseen. The kernel tells them: it sends SIGTERM when the thread that
started them is gone, at which they save and end, and maybe once more for each thread that it gave
them to then, which changes nothing. That holds across exec, and set here, not between fork and
exec of a process with threads, it cannot deadlock.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
"""Of sys/prctl.h: the signal that this process gets when its parent dies."""


def launch(sweep: int, command: list[str]) -> None:
    """Become a program that is told to end when its parent, the process `sweep`, has ended."""
    with contextlib.suppress(ImportError, OSError, AttributeError):  # a Python or libc without it
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != sweep:  # it was gone before it could be watched
        sys.exit(128 + signal.SIGTERM)
    os.execv(command[0], command)


if __name__ == "__main__":
    launch(int(sys.argv[1]), sys.argv[2:])

"""What a terminal gets: one-line texts and errors, things as people say them, closed outputs."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

READER_GONE = 141  # 128 + SIGPIPE


def one_line(text: object) -> str:
    """Write a text or an error as a line that a terminal shows and does not obey.

    Characters that cannot be printed, line ends among them, become their escapes in Python.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def some(items: Sequence[object], most: int = 3) -> str:
    """Name the first of things that may be many, and say how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def counted(number: int, thing: str) -> str:
    """Return a number and what it counts: `1 epoch`, `1,000 epochs`."""
    return f"{number:,} {thing}" + "s" * (number != 1)


def duration(seconds: float) -> str:
    """Write seconds as people say them: 45 s, 3 min 20 s, 2 h 05 min, 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class Parser(argparse.ArgumentParser):
    """Reads flags where torch may be missing; what is wrong is one line, as in all commands."""

    def error(self, message: str) -> NoReturn:
        """Print the line and end the program with exit code 2."""
        self.exit(2, f"error: {one_line(message)} (--help lists every flag)\n")


def keep_outputs() -> None:
    """Let what is printed go nowhere where the program was started with an output closed.

    The next file that it opens would take the number of that output, and with it what is printed.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def reader_has_gone(error: OSError) -> bool:
    """Say whether an error means that who read the output, such as head, has enough of it.

    The program can then end: nothing that is still to be written is an error any more.
    """
    if not isinstance(error, BrokenPipeError):  # and other pipes break too
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not poll.poll(0):
        return False
    _drop_output()
    return True


def _drop_output() -> None:
    """Let nothing more of the standard output be written, at the end of the program either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printed(main: Callable[[], object]) -> int:
    """Run a command that only prints; returns its exit code."""
    keep_outputs()
    try:
        main()
        sys.stdout.flush()
    except OSError as error:
        if reader_has_gone(error):
            return READER_GONE
        _drop_output()
        reason = error.strerror or error
        print(f"error: the output cannot be written ({reason}); send it elsewhere", file=sys.stderr)
        return 2
    return 0

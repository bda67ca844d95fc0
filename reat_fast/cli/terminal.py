"""Words for a terminal: texts and errors made fit for it, seconds as people say them, flags."""

from __future__ import annotations

import argparse
from typing import NoReturn


def one_line(text: object) -> str:
    """Write a text or an error as a line that a terminal shows and does not obey.

    Characters that cannot be printed, line ends among them, become their escapes in Python.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)


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

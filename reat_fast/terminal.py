"""Text of files and errors, made fit for a terminal."""

from __future__ import annotations


def one_line(text: object) -> str:
    """Write a text or an error as a line that a terminal shows and does not obey.

    Characters that cannot be printed, line ends among them, become their escapes in Python.
    """
    shown = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(shown)

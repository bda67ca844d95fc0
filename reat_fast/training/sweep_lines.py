"""The lines of a sweep's file: a run each, behind a name where one is wanted."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from reat_fast.config import Config, parse

OWN_FLAGS = ("--seed", "--run-dir", "--resume", "--help", "-h")
"""Flags that a line may not hold: the sweep sets them."""


@dataclass(frozen=True)
class Line:
    """One line of the file: a run to be repeated with every seed."""

    place: str
    name: str
    words: tuple[str, ...]
    config: Config


def read_lines(file: Path) -> list[Line]:
    """Read and check the lines of a file of runs.

    Errors: ValueError naming file and line for anything that reat_fast.train would refuse.
    """
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file") from None
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; write one run a line, as `reat`") from None
    except IsADirectoryError:
        raise ValueError(f"{file}: is a folder; name a text file of one run a line") from None
    lines: dict[str, Line] = {}
    for number, row in enumerate(text.splitlines(), start=1):
        place = f"{file}:{number}"
        try:
            line = _read_line(place, shlex.split(row, comments=True))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if line is None:
            continue
        if line.name in lines:
            raise ValueError(
                f"{place}: {lines[line.name].place} is called {line.name} too; put another name "
                f"before it, such as {line.name}-2: {shlex.join(line.words)}"
            )
        lines[line.name] = line
    if not lines:
        raise ValueError(f"{file}: names no run; write one a line, such as: reat --epochs 40")
    return list(lines.values())


def _read_line(place: str, words: list[str]) -> Line | None:
    if not words:
        return None
    leading = takewhile(lambda word: not word.startswith("-"), words)
    end = next((at for at, word in enumerate(leading, start=1) if word.endswith(":")), 0)
    name, words = " ".join(words[:end])[:-1], words[end:]
    if not words or words[0].startswith("-"):
        raise ValueError("name a preset first, then flags")
    for word in words:
        if word.partition("=")[0].replace("_", "-") in OWN_FLAGS:
            raise ValueError(f"{word}: leave it out; the sweep sets --seed and --run-dir")
    if end and not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{name!r} cannot be a name; use letters, digits and . _ + -")
    preset, config = parse(words, "")
    return Line(place, name or preset, tuple(words), config)

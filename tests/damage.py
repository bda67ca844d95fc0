"""Damaged files, moves that fail, and the rule that a reader may refuse in one line and no more."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from reat_fast.sources.formats import DataError

MUTATIONS = 300


def mutated(content: bytes, count: int = MUTATIONS, reach: int | None = None) -> Iterator[bytes]:
    """Yield damaged copies: bytes changed, cut out or put in, and the end cut off.

    reach: how many of the first bytes to damage, where the rest is nothing but pixels.
    """
    random = np.random.default_rng(1)
    end = min(reach or len(content), len(content))
    for _ in range(count):
        damaged = bytearray(content)
        for _ in range(random.integers(1, 4)):
            at = int(random.integers(end))
            match random.integers(4):
                case 0 | 1:
                    damaged[at : at + 1] = random.bytes(1)
                case 2:
                    del damaged[at : at + int(random.integers(1, 9))]
                case 3:
                    damaged[at:at] = random.bytes(int(random.integers(1, 9)))
        yield bytes(
            damaged[: int(random.integers(len(damaged)))] if random.random() < 0.1 else damaged
        )


def let_the_second_rename_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is moved into a place that was just cleared not arrive there."""
    rename, calls = Path.rename, itertools.count(1)

    def fail_once(self: Path, target: Path) -> Path:
        if next(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)


def refused_or_valid(read: Callable[[], object]) -> bool:
    """Read, and return whether it was refused; anything but DataError fails the test."""
    try:
        read()
    except DataError as error:
        assert "\n" not in str(error)
        return True
    return False

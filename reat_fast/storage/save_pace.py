"""How often a run saves: as often as it can afford."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SHARE = 0.05
"""Of the time of a run, what saving may take: on a GPU an epoch can be as short as a save."""

CHEAP = 0.1
"""Seconds that a save may take in any case."""


class SavePace:
    """Know when a run was last saved and what that took. clock: seconds; tests pass their own."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._saved = clock()
        self.took = 0.0
        """Seconds of the last save."""

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Time the save that is made inside the block."""
        began = self._clock()
        yield
        self._saved = self._clock()
        self.took = self._saved - began

    @property
    def age(self) -> float:
        """Seconds since the last save."""
        return self._clock() - self._saved

    def affordable(self) -> bool:
        """Say whether a save like the last one would keep to its share of the time since then."""
        return self.took <= max(CHEAP, SHARE * self.age)

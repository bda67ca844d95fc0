"""Where a search of AutoAttack stands, and the file in which it keeps that.

The file is named after the search, so that another one in the same folder does not take its place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reat_fast.evaluation.square import Reached
from reat_fast.storage.whole_files import write_atomically

STATES = "autoattack-state-*.pt"


@dataclass
class Standing:
    """Which images stand, and how far the search is: what a broken-off search needs to go on."""

    robust: Tensor  # bool [N]
    run: int = 0
    pending: Tensor | None = None  # int64, images that the current run has not seen
    after: dict[str, int] = field(default_factory=dict)  # images that stand after each stage


@dataclass(frozen=True)
class Within:
    """Where Square is within a batch."""

    size: int  # images of the batch, the first of those that are pending
    rows: Tensor  # int64 on the CPU: those of them that it began with, or went on with
    reached: Reached

    @property
    def left(self) -> Tensor:
        """Which images have not fallen yet, int64 on the CPU."""
        return self.rows[self.reached.rows.cpu()]

    def saved(self) -> dict[str, Any]:
        """Return what a state keeps, on the CPU."""
        reached = self.reached
        tensors = {"left": self.left, "best": reached.best.cpu(), "margin": reached.margin.cpu()}
        return {"size": self.size, "queries": reached.queries, **tensors}

    @classmethod
    def loaded(cls, size: int, queries: int, left: Tensor, best: Tensor, margin: Tensor) -> Within:
        """Return what was saved."""
        return cls(size, left, Reached(queries, torch.arange(len(left)), best, margin))


class SearchState:
    """Read, write and remove the states of one search after the other in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._key = folder, ""
        self._read: set[Path] = set()

    @property
    def file(self) -> Path:
        """Where the state of the search is that was read last, by its key."""
        return self._folder / STATES.replace("*", self._key[:8])

    def read(self, key: str) -> dict[str, Any] | None:
        """Return what the search with this key left; from now on the state is that of this one."""
        self._key = key
        self._read.add(self.file)
        if not self.file.is_file():
            return None
        try:
            saved: dict[str, Any] = torch.load(self.file, weights_only=True)
            return dict(saved["standing"]) if saved["key"] == key else None
        except Exception:  # torch.load has no base class for what a damaged file raises
            return None

    def write(self, standing: dict[str, Any]) -> None:
        """Keep where the search stands."""
        saved = {"key": self._key, "standing": standing}
        write_atomically(self.file, lambda partial: torch.save(saved, partial))

    @property
    def kept(self) -> bool:
        """Whether there is anything to go on from."""
        return any(file.is_file() for file in self._read)

    def remove(self) -> None:
        """Remove the states of the searches that were read; those of others stay."""
        for file in self._read:
            file.unlink(missing_ok=True)

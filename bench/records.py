"""Measured figures as rows of bench/results/<device>.csv, with what it takes to repeat them.

Programs append; nobody edits. A row says what, value and unit, on which shape, dtype and device,
with which versions and commit, when, and by which command.
"""

from __future__ import annotations

import csv
import functools
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path

from reat_fast.env import environment

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Figure:
    """One measured value: median or mean with its spread (largest minus smallest) over repeats."""

    what: str
    value: float
    spread: float
    repeats: int
    unit: str
    shape: str = ""
    dtype: str = "float32"

    @classmethod
    def of(
        cls,
        what: str,
        values: Sequence[float],
        unit: str,
        shape: str = "",
        dtype: str = "float32",
        average: Callable[[Sequence[float]], float] = statistics.median,
    ) -> Figure:
        """Sum up what was measured several times."""
        spread = max(values) - min(values)
        return cls(what, average(values), spread, len(values), unit, shape, dtype)


def record(figures: Iterable[Figure], device: str, command: str, folder: Path = RESULTS) -> Path:
    """Append figures measured on `device` ("cpu" or "cuda") by `command`; return the file.

    Errors: ValueError where the file holds other columns.
    """
    facts = _facts(device)
    name = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-")
    file = folder / f"{name}.csv"
    rows = [
        {**{k: _text(v) for k, v in asdict(figure).items()}, **facts, "command": command}
        for figure in figures
    ]
    columns = [field.name for field in fields(Figure)] + [*facts, "command"]
    is_new = not file.exists()
    if not is_new:
        with file.open(newline="", encoding="utf-8") as table:
            found = next(csv.reader(table))
        if found != columns:
            raise ValueError(f"{file}: has the columns of another version; move it away")
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as table:
        writer = csv.DictWriter(table, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    return file


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


@functools.cache
def _facts(device: str) -> dict[str, object]:
    """Describe what is measured on, once a program: its own rows must not count as changes."""
    known = environment()
    gpus = known["gpus"]
    gpu = gpus[0] if device.startswith("cuda") and isinstance(gpus, list) and gpus else {}
    dirty = " with changes" if known["dirty"] else ""
    return {
        "device": gpu.get("name") or f"{known['cpu']} {known['cpu_cores']} cores",
        "power_limit_watts": gpu.get("power_limit_watts", ""),
        "driver": known["driver"] or "",
        "python": known["python"],
        "torch": known["torch"],
        "triton": known["triton"] or "",
        "commit": f"{known['commit'] or ''}{dirty}",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }

"""Clocks, power and temperature of the first GPU while something runs, by nvidia-smi.

A clock that is read when nothing runs says nothing, so it is read every second meanwhile.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SECONDS = 1.0
FIELDS = {
    "sm_mhz": "clocks.sm",
    "sm_max_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "power_limit_watts": "power.limit",
    "celsius": "temperature.gpu",
}
"""What is read, and its name in nvidia-smi."""

Reading = dict[str, float]


@contextmanager
def watched_clocks() -> Iterator[list[Reading]]:
    """Fill a list with readings while the block runs; it stays empty where nothing can be read."""
    readings: list[Reading] = []
    ended = threading.Event()

    def watch() -> None:
        while not ended.is_set() and (reading := read_clocks()):
            readings.append(reading)
            ended.wait(SECONDS)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield readings
    finally:
        ended.set()
        watcher.join()


def read_clocks() -> Reading:
    """Return what nvidia-smi says now of the FIELDS that it can read."""
    query = f"--query-gpu={','.join(FIELDS.values())}"
    command = ["nvidia-smi", "--id=0", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return {}
    words = [word.strip() for word in done.stdout.strip().split(",")]
    if done.returncode or len(words) != len(FIELDS):
        return {}
    numbers = zip(FIELDS, words, strict=True)
    return {name: float(word) for name, word in numbers if word.replace(".", "", 1).isdigit()}


def summary(readings: list[Reading]) -> dict[str, dict[str, float]]:
    """Return least, median and most of each field that was read."""
    found = {}
    for name in FIELDS:
        values = [reading[name] for reading in readings if name in reading]
        if values:
            middle = statistics.median(values)
            found[name] = {"least": min(values), "median": middle, "most": max(values)}
    return found

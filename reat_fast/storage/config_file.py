"""A configuration as JSON text, as runs and exported models keep it, and how two differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from reat_fast.cli.command import flag
from reat_fast.config import Config
from reat_fast.storage.typed_fields import from_values

LOCAL_FIELDS = (
    *("run_dir", "resume", "device", "data", "loader", "workers", "attack_form", "update_form"),
    *("on_nonfinite", "save_minutes", "profile", "quiet", "log", "skip_bad", "eval_batch_size"),
)
"""Fields that may differ on resume: they say where a run lives and how it reports, and of what it
computes they change roundings at most. Of skip_bad what matters is compared: the images."""


def changes(begun: Config, now: Config) -> Iterator[tuple[str, object, object]]:
    """Yield flag, old and new value of each field in which two runs compute different things."""
    for field in dataclasses.fields(Config):
        # Unset, its value depends on another field.
        name = "evaluated_every" if field.name == "eval_every" else field.name
        old, new = getattr(begun, name), getattr(now, name)
        if old != new and field.name not in LOCAL_FIELDS:
            yield flag(field.name), old, new


def to_json(config: Config) -> str:
    """Write a configuration as JSON text; from_json reads it back equal."""
    values = dataclasses.asdict(config)
    return json.dumps(values, indent=2, default=str)


def from_json(text: str, source: str = "config.json") -> Config:
    """Read a configuration that to_json wrote; what an older version did not write is as usual.

    Errors: ValueError naming the source for text that is not one, and for unknown fields.
    """
    try:
        values = json.loads(text)
        if isinstance(values, dict):
            values = values.get("training", values)  # an exported config.json holds more
        if not isinstance(values, dict):
            raise ValueError("no object of fields")
        known = {field.name for field in dataclasses.fields(Config)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}, written by another version")
        if values.get("attack_form") == "trial":  # is gone, and triton since
            values["attack_form"] = "triton"
        for name in ("data", "run_dir", "resume"):
            values[name] = Path(values[name]) if values.get(name) else None
        for name in {"milestones", "log"} & set(values):
            values[name] = tuple(values[name])
        return from_values(Config, values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{source}: not a configuration of reat_fast ({error})") from error

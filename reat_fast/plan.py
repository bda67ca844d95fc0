"""What the command line of a training run asks for, checked before anything is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reat_fast import checkpoint
from reat_fast.checkpoint import CheckpointError
from reat_fast.command import choose_device
from reat_fast.config import LOCAL_FIELDS, Config, flag, from_json, parse


@dataclass
class Plan:
    """What the command line asks for, checked, with nothing written yet."""

    preset: str
    reason: str
    config: Config
    device: torch.device
    run_dir: Path
    state: dict[str, Any] | None
    """The checkpoint to go on from, or None for a new run."""


def make_plan(arguments: list[str]) -> Plan:
    """Read the command line; errors: ValueError with one line."""
    cuda = torch.cuda.is_available()
    preset, config = parse(arguments, "reat" if cuda else "quickstart")
    found = "a CUDA device was found" if cuda else "no CUDA device was found"
    named = bool(arguments) and not arguments[0].startswith("-")
    reason = "as asked" if named else f"no preset was named and {found}"
    state = None
    if config.resume is not None:
        if named:
            raise ValueError(
                f"--resume {config.resume}: a run keeps its preset; leave out {preset}"
            )
        if not config.resume.is_dir():
            raise CheckpointError(f"--resume {config.resume}: no such folder")
        state = checkpoint.load_checkpoint(config.resume / checkpoint.CHECKPOINT)
        saved = from_json(state["config"], str(config.resume / checkpoint.CHECKPOINT))
        preset, reason = state["preset"], f"resumed from {config.resume}"
        _, config = parse(arguments, preset, default=saved)
        _refuse_changes(saved, config)
    run_dir = config.resume or checkpoint.new_run_dir(config.run_dir, preset)
    return Plan(preset, reason, config, choose_device(config.device), run_dir, state)


def _refuse_changes(saved: Config, config: Config) -> None:
    for field in dataclasses.fields(Config):
        old, new = getattr(saved, field.name), getattr(config, field.name)
        if old != new and field.name not in LOCAL_FIELDS:
            raise ValueError(
                f"{flag(field.name)} {new}: the run was begun with {old}; leave it out"
            )

"""What the command line of a training run asks for, checked before anything is written."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from reat_fast import checkpoint
from reat_fast.cli.command import choose_own_device
from reat_fast.config import Config, parse
from reat_fast.engine.distributed import World
from reat_fast.storage.config_file import changes, from_json
from reat_fast.storage.weights_file import CheckpointError
from reat_fast.training.logs import check_logs
from reat_fast.training.run_folder import DESCRIPTION, never_began, new_run_dir, newest_run


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
    source: Path | None
    """The file that it was read from."""
    world: World = World()


def make_plan(arguments: list[str], world: World | None = None) -> Plan:
    """Read the command line; errors: ValueError with one line."""
    world = world or World()
    cuda = torch.cuda.is_available()
    preset, config = parse(arguments, "reat" if cuda else "quickstart")
    found = "a CUDA device was found" if cuda else "no CUDA device was found"
    named = bool(arguments) and not arguments[0].startswith("-")
    reason = "as asked" if named else f"no preset was named and {found}"
    resume, state, source = _folder_to_resume(config, world), None, None
    if resume is not None and named and config.resume is not None:
        raise ValueError(f"--resume {config.resume}: a run keeps its preset; leave out {preset}")
    if config.resume is not None and config.run_dir not in (None, resume):
        raise ValueError(f"--run-dir {config.run_dir}: the run stays in {resume}; leave it out")
    if resume is not None:
        state, source = checkpoint.load_newest_checkpoint(resume)
        saved = replace(from_json(state["config"], str(source)), quiet=False)  # of one command
        preset, reason = state["preset"], f"resumed from {source}"
        flags = arguments[1:] if named else arguments
        _, config = parse(flags, preset, default=saved)
        for name, old, new in changes(saved, config):
            raise ValueError(
                f"{name} {new}: the run was begun with {old}; leave it out, or begin a new run"
            )
        _refuse_edited(resume, saved)
    if config.data is not None and config.data.exists():
        # So that a run is gone on with and evaluated from other folders, too.
        config = replace(config, data=config.data.absolute())
    check_logs(config.log)
    device = choose_own_device(config.device, world)
    run_dir = resume or _new_run_dir(config, preset, world)
    return Plan(preset, reason, config, device, run_dir, state, source, world)


def _folder_to_resume(config: Config, world: World) -> Path | None:
    """Return the run to go on with: the one named, the newest one, or that of a restarted job."""
    if config.resume is not None:
        if str(config.resume) == "auto":
            return newest_run(Path("runs"))
        if config.resume.is_file():
            folder = shlex.quote(str(config.resume.parent))
            raise CheckpointError(f"--resume {config.resume}: is a file; give its folder, {folder}")
        if not config.resume.is_dir():
            raise CheckpointError(f"--resume {config.resume}: no such folder")
        if never_began(config.resume):
            raise CheckpointError(
                f"--resume {config.resume}: holds nothing to go on from, its run ended before the "
                f"first step; begin it with --run-dir {shlex.quote(str(config.resume))}"
            )
        return config.resume
    # torchrun starts a failed job again with the command line it had.
    if world.restarts and config.run_dir is not None and checkpoint.has_checkpoint(config.run_dir):
        return config.run_dir
    return None


def _refuse_edited(folder: Path, saved: Config) -> None:
    """Raise ValueError where config.json was changed by hand: a checkpoint goes on as it began."""
    file = folder / DESCRIPTION[0]
    try:
        described = from_json(file.read_text("utf-8"))
    except (ValueError, OSError):
        return  # damaged, of an older version, or not there: written again
    for name, old, new in changes(saved, described):
        raise ValueError(
            f"{file}: says {name} {new}, the run was begun with {old}; put that back, or begin a "
            "new run"
        )


def _new_run_dir(config: Config, preset: str, world: World) -> Path:
    may_restart = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
    if config.run_dir is None and may_restart:
        raise ValueError(
            "torchrun --max-restarts: name the folder with --run-dir, so that a restarted job "
            "finds its checkpoint"
        )
    if config.run_dir is not None and (world.restarts or not world.main):
        return config.run_dir  # the main process looks, and what an earlier attempt left is ours
    if config.run_dir is not None and never_began(config.run_dir):
        return config.run_dir  # what it holds is written again
    return new_run_dir(config.run_dir, preset)

"""Checkpoints of a run, and how a model comes out of one, a run folder, an export or weights.

The state of a run is read with weights_only, and weights are safetensors, so that no file can run
code.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reat_fast.cli.terminal import first_line
from reat_fast.engine.average import PREFIX
from reat_fast.networks.architectures import Network
from reat_fast.storage import whole_files
from reat_fast.storage.json_object import read_object
from reat_fast.storage.weights_file import CheckpointError as CheckpointError
from reat_fast.storage.weights_file import ModelSpec as ModelSpec
from reat_fast.storage.weights_file import read_weights, spec_of
from reat_fast.storage.weights_file import save_weights as save_weights

CHECKPOINT = "checkpoint-last.pt"
PREVIOUS = "checkpoint-previous.pt"
BEST, LAST = "best.safetensors", "last.safetensors"
WEIGHTS = (BEST, LAST)
EXPORTED = "model.safetensors"
POSITION: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("preset", "config", "fingerprint"), (str,)),
    **dict.fromkeys(("epoch", "batch"), (int,)),
    "lr_scale": (int, float),
    **dict.fromkeys(("code", "optimizer", "step"), (dict,)),
    **dict.fromkeys(("metrics", "timing"), (list,)),
    "best": (dict, type(None)),
}
"""What a checkpoint holds beside its model where a run can go on from it, and of which types."""


def save_checkpoint(run_dir: Path, state: dict[str, Any]) -> None:
    """Write everything a resumed run needs; the one before is kept beside it."""
    newest, previous = run_dir / CHECKPOINT, run_dir / PREVIOUS
    if newest.exists():
        # Another name for the same file: at no moment is there no whole checkpoint.
        whole_files.write_atomically(previous, lambda partial: _link(newest, partial))
    whole_files.write_atomically(newest, lambda partial: torch.save(state, partial))


def _link(existing: Path, name: Path) -> None:
    name.unlink(missing_ok=True)
    try:
        os.link(existing, name)
    except OSError:  # a file system without links
        shutil.copyfile(existing, name)


def has_checkpoint(run_dir: Path) -> bool:
    """Say whether a folder holds something to go on from."""
    return any((run_dir / name).is_file() for name in (CHECKPOINT, PREVIOUS))


def load_newest_checkpoint(run_dir: Path) -> tuple[dict[str, Any], Path]:
    """Read the newest checkpoint of a run that is whole; returns it and its file.

    One that is damaged is named on stderr, and the one before it is taken.
    Errors: CheckpointError where none is whole.
    """
    newest, previous = run_dir / CHECKPOINT, run_dir / PREVIOUS
    try:
        return _load_position(newest), newest
    except CheckpointError as error:
        if not previous.is_file():
            raise
        state = _load_position(previous)
        print(f"{error}; going on from {previous}", file=sys.stderr, flush=True)
        return state, previous


def _load_position(path: Path) -> dict[str, Any]:
    state = load_checkpoint(path)
    missing = set(POSITION) - state.keys()
    if missing:
        raise CheckpointError(f"{path}: nothing to go on from, has no {', '.join(sorted(missing))}")
    for name, kinds in POSITION.items():
        if not isinstance(state[name], kinds):
            found = type(state[name]).__name__
            raise CheckpointError(f"{path}: nothing to go on from, {name} cannot be a {found}")
    return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what save_checkpoint wrote onto the CPU; tensors and plain values only, no code.

    Errors: CheckpointError naming the file; OSError for one that may not be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; give the folder of a run") from None
    except PermissionError:  # it is not damaged: going on from the one before would lose steps
        raise OSError(
            f"{path}: may not be read by this user; chmod u+r, or run as its owner"
        ) from None
    except Exception as error:  # torch.load has no base class for what a damaged file raises
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint of reat_fast ({type(error).__name__})"
        ) from error
    weights = state.get("model") if isinstance(state, dict) and "model_spec" in state else None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise CheckpointError(f"{path}: not a checkpoint of reat_fast")
    if not all(isinstance(state.get(name, 0), int) for name in ("epoch", "batch")):
        raise CheckpointError(f"{path}: not a checkpoint of reat_fast, its epoch is no number")
    return dict(state)


def glance(run_dir: Path) -> dict[str, Any]:
    """Return the newest checkpoint of a run for its plain values alone, {} where there is none.

    Mapped, so that tensors are not read, wherever they were: a GPU may be in use or missing.
    """
    try:
        state = torch.load(run_dir / CHECKPOINT, "cpu", mmap=True, weights_only=True)
        return dict(state)
    except Exception:  # torch.load has no base class for what a damaged file raises
        return {}


def load_model(run_or_checkpoint: str | Path, map_location: str | torch.device = "cpu") -> Network:
    """Load a trained classifier: an eval-mode module on images [B, C, H, W] in [0, 1].

    run_or_checkpoint: the folder of a run (best.safetensors, else last.safetensors; the other way
    round in a run with --select last), an exported folder, one .safetensors file, or a
    checkpoint-last.pt, whose averaged weights are taken where there are any. When called, the
    module returns logits [B, K].
    Errors: CheckpointError naming the file; ValueError for a device that is not there.
    """
    model, _ = load_model_and_spec(Path(run_or_checkpoint), map_location)
    return model


def load_model_and_spec(
    path: Path, map_location: str | torch.device = "cpu"
) -> tuple[Network, ModelSpec]:
    """Load a classifier and what it was built from; see load_model."""
    file = find_weights(path)
    if file.suffix == ".pt":
        state = load_checkpoint(file)
        if (state.get("epoch"), state.get("batch")) == (0, 0):
            cure = f"let its run save again, or go on with --resume {shlex.quote(str(file.parent))}"
            raise CheckpointError(f"{file}: is of before the first step; {cure}")
        spec, tensors = spec_of(state["model_spec"], file), state["model"] | _averages(state, file)
    else:
        spec, tensors = read_weights(file)
    _check_sizes(spec, tensors, file)
    model = spec.build()
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{file}: weights do not fit {spec.name} ({reason})") from error
    try:
        return model.eval().to(map_location), spec
    except (RuntimeError, AssertionError) as error:  # a device that is not there
        reason = first_line(error)
        raise ValueError(f"map_location {map_location}: cannot be used ({reason})") from error


def find_weights(path: Path) -> Path:
    """Name the file that load_model reads for a run folder or a file."""
    if path.is_dir():
        weights = WEIGHTS[::-1] if _selects_last(path) else WEIGHTS
        for name in (*weights, EXPORTED, CHECKPOINT):
            if (path / name).is_file():
                return path / name
        known = ", ".join((*WEIGHTS, EXPORTED, CHECKPOINT))
        raise CheckpointError(f"{path}: holds no weights ({known})")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if path.suffix not in (".safetensors", ".pt"):
        raise CheckpointError(f"{path}: give a run folder, a .safetensors file or a {CHECKPOINT}")
    return path


def _check_sizes(spec: ModelSpec, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Refuse a header that asks for a larger network than the weights fill, before one is built.

    A few bytes may ask for 10^9 classes, and building them would take all memory before
    load_state_dict finds that they do not fit. In an honest file each of the sizes is that of some
    weight; a width of None is create_model's own.
    """
    sizes = {size for tensor in tensors.values() if tensor.numel() for size in tensor.shape}
    if not {spec.num_classes, spec.in_channels, spec.width or spec.in_channels} <= sizes:
        raise CheckpointError(f"{file}: weights do not fit {spec.name} as its header has it")


def _averages(state: dict[str, Any], file: Path) -> dict[str, Tensor]:
    """Return the averaged weights of a checkpoint, which are the ones that count, if it has any."""
    kept = state.get("step")
    named = kept.items() if isinstance(kept, dict) else ()
    found = {str(n).removeprefix(PREFIX): t for n, t in named if str(n).startswith(PREFIX)}
    if not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise CheckpointError(f"{file}: not a checkpoint of reat_fast, averages are no tensors")
    return found


def _selects_last(run_dir: Path) -> bool:
    file = run_dir / "config.json"
    try:
        return file.is_file() and read_object(file).get("select") == "last"
    except ValueError as error:
        raise CheckpointError(f"{file}: damaged or not JSON ({error})") from None

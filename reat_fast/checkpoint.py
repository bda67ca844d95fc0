"""The run folder: what is in it, how it is written, and how a model comes out of it.

Weights are safetensors; the state of a run is read with weights_only, so that no file can run code.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reat_fast.engine.average import PREFIX
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.storage import whole_files
from reat_fast.storage.typed_fields import from_values

CHECKPOINT = "checkpoint-last.pt"
PREVIOUS = "checkpoint-previous.pt"
WEIGHTS = ("best.safetensors", "last.safetensors")
EXPORTED = "model.safetensors"
POSITION = (
    *("preset", "code", "config", "fingerprint", "epoch", "batch", "lr_scale", "optimizer", "step"),
    *("metrics", "timing", "best"),
)
"""What a checkpoint holds beside its model where a run can go on from it."""


class CheckpointError(ValueError):
    """A run folder or checkpoint that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class ModelSpec:
    """What create_model needs to build the network of a run."""

    name: str
    num_classes: int
    in_channels: int
    width: int | None
    stem_stride: int | None
    class_names: tuple[str, ...]
    head: str = "linear"
    small_stem: bool = False

    def build(self) -> Network:
        """Build the network with fresh weights."""
        network = create_model(
            self.name,
            self.num_classes,
            in_channels=self.in_channels,
            width=self.width,
            stem_stride=self.stem_stride,
            small_stem=self.small_stem,
        )
        if self.head == "cosine":
            use_cosine_head(network)
        return network


def new_run_dir(run_dir: Path | None, preset: str) -> Path:
    """Choose the folder of a new run: the one asked for, or the next free runs/PRESET-N.

    Errors: CheckpointError when the folder already holds a run or anything else.
    """
    if run_dir is None:
        numbered = (Path("runs") / f"{preset}-{number}" for number in itertools.count(1))
        return next(folder for folder in numbered if not os.path.lexists(folder))  # also links
    if run_dir.exists() and not run_dir.is_dir():
        raise CheckpointError(f"--run-dir {run_dir}: is a file; name a folder")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise CheckpointError(
            f"--run-dir {run_dir}: already holds files; go on with --resume {run_dir} "
            "or name another folder"
        )
    return run_dir


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


def newest_run(folder: Path) -> Path:
    """Return the run below `folder` whose checkpoint was written last.

    Errors: CheckpointError where there is none.
    """
    found = [file for name in (CHECKPOINT, PREVIOUS) for file in folder.glob(f"*/{name}")]
    if not found:
        raise CheckpointError(f"--resume auto: no run with a checkpoint in {folder}; name one")
    return max(found, key=lambda file: file.stat().st_mtime_ns).parent


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
    return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what save_checkpoint wrote onto the CPU; tensors and plain values only, no code.

    Errors: CheckpointError naming the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not look at the checksums
                raise zipfile.BadZipFile
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; give the folder of a run") from None
    except Exception as error:  # torch.load has no base class for what a damaged file raises
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint of reat_fast ({type(error).__name__})"
        ) from error
    weights = state.get("model") if isinstance(state, dict) and "model_spec" in state else None
    if not isinstance(weights, dict) or not all(isinstance(t, Tensor) for t in weights.values()):
        raise CheckpointError(f"{path}: not a checkpoint of reat_fast")
    return dict(state)


def save_weights(path: Path, model: Network, spec: ModelSpec) -> None:
    """Write weights as safetensors, with what is needed to build the network in the header."""
    write_weights(path, packed_weights(model, spec))


def write_weights(path: Path, packed: bytes) -> None:
    """Write what packed_weights returned."""
    whole_files.write_atomically(path, lambda partial: partial.write_bytes(packed))


def packed_weights(model: Network, spec: ModelSpec) -> bytes:
    """Return the content of the file that save_weights writes."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    # One entry: safetensors writes several in a random order, and equal weights are equal files.
    header = {"reat_fast": json.dumps({**asdict(spec), "sha256": _digest(tensors)})}
    return save(tensors, header)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names and values, since safetensors holds no checksum."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def load_model(run_or_checkpoint: str | Path, map_location: str | torch.device = "cpu") -> Network:
    """Load a trained classifier: an eval-mode module on images [B, C, H, W] in [0, 1].

    run_or_checkpoint: the folder of a run (best.safetensors, else last.safetensors; the other way
    round in a run with --select last), an exported folder, one .safetensors file, or a
    checkpoint-last.pt, of which the averaged weights count where it has them. Returns logits [B, K]
    when called.
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
            cure = f"let its run save again, or go on with --resume {file.parent}"
            raise CheckpointError(f"{file}: is of before the first step; {cure}")
        spec, tensors = _spec(state["model_spec"], file), state["model"] | _averages(state)
    else:
        spec, tensors = _read_weights(file)
    sizes = {size for tensor in tensors.values() if tensor.numel() for size in tensor.shape}
    if not {spec.num_classes, spec.in_channels, spec.width or spec.in_channels} <= sizes:
        raise CheckpointError(f"{file}: weights do not fit {spec.name} as its header has it")
    model = spec.build()
    try:
        model.load_state_dict(tensors)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{file}: weights do not fit {spec.name} ({reason})") from error
    try:
        return model.eval().to(map_location), spec
    except (RuntimeError, AssertionError) as error:  # a device that is not there
        reason = str(error).splitlines()[0]
        raise ValueError(f"map_location {map_location}: cannot be used ({reason})") from error


def _averages(state: dict[str, Any]) -> dict[str, Any]:
    """Return the averaged weights of a checkpoint, which are the ones that count, if it has any."""
    kept = state.get("step")
    named = kept.items() if isinstance(kept, dict) else ()
    return {str(n).removeprefix(PREFIX): t for n, t in named if str(n).startswith(PREFIX)}


def find_weights(path: Path) -> Path:
    """Name the file that load_model reads for a run folder or a file."""
    if path.is_dir():
        weights = WEIGHTS[::-1] if _selects_last(path) else WEIGHTS
        for name in (*weights, EXPORTED, CHECKPOINT):
            if (path / name).is_file():
                return path / name
        raise CheckpointError(f"{path}: holds no weights ({', '.join(WEIGHTS)}, {CHECKPOINT})")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such run or checkpoint")
    if path.suffix not in (".safetensors", ".pt"):
        raise CheckpointError(f"{path}: give a run folder, a .safetensors file or a {CHECKPOINT}")
    return path


def _selects_last(run_dir: Path) -> bool:
    file = run_dir / "config.json"
    try:
        values = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged or not JSON ({error})") from None
    return isinstance(values, dict) and values.get("select") == "last"


def train_counts(run_dir: Path) -> list[int] | None:
    """Return the training images per class of a run or an export, where its folder tells."""
    split = run_dir / "split.json"
    file = split if split.is_file() else run_dir / "config.json"
    if not file.is_file():
        return None
    try:
        counts = json.loads(file.read_text("utf-8")).get("train_counts")
        if counts is None and file != split:
            return None  # only an export has them there
        return [int(count) for count in counts]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: damaged, gives no train_counts ({error})") from None


def _read_weights(file: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as archive:
            metadata = archive.metadata() or {}
            tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged or not safetensors ({error})") from error
    if "reat_fast" not in metadata:
        raise CheckpointError(f"{file}: has no reat_fast header, so the network is unknown")
    try:
        values = json.loads(metadata["reat_fast"])
        digest = values.pop("sha256", None)
    except (json.JSONDecodeError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{file}: damaged reat_fast header ({error})") from error
    if digest is not None and digest != _digest(tensors):
        raise CheckpointError(f"{file}: damaged, its weights are not those that were saved")
    return _spec(values, file), tensors


def _spec(values: dict[str, Any], file: Path) -> ModelSpec:
    try:
        names = tuple(values["class_names"])
        return from_values(ModelSpec, {**values, "class_names": names})
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: written by another version ({error})") from error

"""Weights as safetensors: what is written, and the network that a file's header describes.

safetensors holds no code and no checksum, so a sha256 of the weights is in the header too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.storage import whole_files
from reat_fast.storage.typed_fields import from_values


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
    head: Literal["linear", "cosine"] = "linear"
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


def read_weights(file: Path) -> tuple[ModelSpec, dict[str, Tensor]]:
    """Read what save_weights wrote, compared with its sha256 where the header has one.

    Errors: CheckpointError naming the file.
    """
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
        if not isinstance(values, dict):
            raise ValueError("no object of fields")
        digest = values.pop("sha256", None)
    except (ValueError, RecursionError) as error:  # the first for very long numbers, too
        raise CheckpointError(f"{file}: damaged reat_fast header ({error})") from error
    if digest is not None and digest != _digest(tensors):
        raise CheckpointError(f"{file}: damaged, its weights are not those that were saved")
    return spec_of(values, file), tensors


def spec_of(values: dict[str, Any], file: Path) -> ModelSpec:
    """Return the ModelSpec whose fields a file holds, each of its type.

    Errors: CheckpointError naming the file.
    """
    try:
        names = tuple(values["class_names"])
        return from_values(ModelSpec, {**values, "class_names": names})
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: written by another version ({error})") from error


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of names and values, since safetensors holds no checksum."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.cpu().flatten().view(torch.uint8).numpy().data)
    return hashed.hexdigest()

"""python -m reat_fast.export RUN --to FOLDER: a trained classifier in a form that others can read.

Each form is a folder with a config.json that says what the classifier is, what it was trained on
and what was measured of it: model.safetensors, which load_model reads; model.onnx, compared with
PyTorch before it is kept; or the safetensors folder with a model card, as the Hugging Face Hub has
it. The network is used only where --push asks for it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from reat_fast import checkpoint
from reat_fast.cli.command import parse_flags, refuse_below, run_command
from reat_fast.cli.extras import import_extra
from reat_fast.config import Config
from reat_fast.engine.stopping import ended_by_sigterm
from reat_fast.evaluation.saved import files, weights_sha256
from reat_fast.networks.architectures import Network
from reat_fast.sharing.model_card import model_card
from reat_fast.sharing.onnx_graph import TOLERANCE, compare_onnx, write_onnx
from reat_fast.storage import weights_file
from reat_fast.storage.config_file import LOCAL_FIELDS
from reat_fast.storage.json_object import read_object
from reat_fast.storage.weights_file import ModelSpec
from reat_fast.storage.whole_files import replacing, write_text

ONNX, DESCRIPTION, CARD = "model.onnx", "config.json", "README.md"
FILES = (checkpoint.EXPORTED, ONNX, DESCRIPTION, CARD)
EVALUATIONS = "evaluation*.json"
LIBRARY = "reat_fast"

MEASURED = (
    "dataset",
    "samples",
    "eps",
    "step_size",
    "l2_eps",
    "restarts",
    "precision",
    "seed",
    "weights_epoch",
    "images_sha256",
    "per_class_samples",
    "train_counts",
    "attacks",
)
"""What is taken over from an evaluation: figures and their conditions, nothing of the machine."""


def describe(run: Path, spec: ModelSpec, weights: Path) -> dict[str, Any]:
    """Say in values for JSON what a classifier is, how it was trained and what was measured.

    run: folder of the run, or of an earlier export. The evaluation is None unless it was of these
    very weights.
    Errors: ValueError naming a damaged file.
    """
    training, split = _training_and_split(run)
    evaluation = _evaluation(run, weights)
    fields = {field.name for field in dataclasses.fields(Config)} - set(LOCAL_FIELDS)
    return {
        "library_name": LIBRARY,
        "architecture": spec.name,
        "width": spec.width,
        "stem_stride": spec.stem_stride,
        "num_classes": spec.num_classes,
        "class_names": list(spec.class_names),
        "channels": spec.in_channels,
        "image_size": split.get("image_size") or split.get("image_shape", [None, None])[:2],
        "input": "float32 [batch, channels, height, width] in [0, 1], not normalised further",
        "output": "logits, float32 [batch, num_classes]",
        "preset": split.get("preset"),
        "dataset": split.get("dataset"),
        "train_counts": split.get("train_counts"),
        "eps": training.get("eps"),
        "training": {name: value for name, value in training.items() if name in fields},
        "weights": weights.name,
        "evaluation": {name: evaluation[name] for name in MEASURED if name in evaluation} or None,
    }


def _training_and_split(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what config.json and split.json of a run tell; an export has both in config.json."""
    told = _read_json(run / "config.json")
    if told.get("library_name") != LIBRARY:
        return told, _read_json(run / "split.json")
    training = told.get("training")
    if not isinstance(training, dict):
        raise ValueError(f"{run / 'config.json'}: damaged, holds no training configuration")
    return training, told


def _evaluation(run: Path, weights: Path) -> dict[str, Any]:
    """Return the first evaluation in a folder that is of these weights, {} where none is.

    That of an earlier export stands in its config.json, as do the bytes that it wrote.
    """
    known = weights_sha256(weights)
    there = map(_read_json, takewhile(Path.is_file, files(run)))
    found = next((one for one in there if one.get("weights_sha256") == known), None)
    if found is not None:
        return found
    told = _read_json(run / DESCRIPTION)
    exported = told.get("library_name") == LIBRARY and told.get("weights_sha256") == known
    return dict(told.get("evaluation") or {}) if exported else {}


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{file}: damaged or not JSON ({error})") from None


def push(folder: Path, repository: str, *, public: bool = False) -> str:
    """Upload a folder to a model repository of the Hugging Face Hub; return its address.

    The token is the one that `hf auth login` stored, or HF_TOKEN. A new repository is private
    unless public.
    Errors: ValueError with one line, from which the token is struck out.
    """
    hub = import_extra("huggingface_hub", "--push", "hub")
    try:
        api = hub.HfApi()
        api.create_repo(repository, repo_type="model", private=not public, exist_ok=True)
        message = f"Upload from {LIBRARY}"
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            allow_patterns=list(FILES),
        )
    except Exception as error:  # OSError, ValueError or, where no network is, one of httpx
        line = " ".join(str(error).split()) or type(error).__name__
        token = hub.get_token()
        line = line.replace(token, "***") if token else line
        cure = "`hf auth login` or HF_TOKEN gives a token that may write there"
        cure = "the Hugging Face Hub can be reached" if _is_unreachable(error) else cure
        raise ValueError(
            f"--push {repository}: {line[:300]}; {folder} is whole, so export again with --force "
            f"once {cure}"
        ) from None
    return f"https://huggingface.co/{repository}"


def _is_unreachable(error: BaseException | None) -> bool:
    """Say whether no connection came about, whichever HTTP library the hub's own stands on."""
    while error is not None:
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return True
        error = error.__cause__ or error.__context__
    return False


def refuse_to_overwrite(to: Path, force: bool) -> None:
    """Raise ValueError unless `to` is free, or force is given and it is a mere earlier export.

    Evaluations of that export may lie in it.
    """
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return
    earlier = to.is_dir() and _read_json(to / DESCRIPTION).get("library_name") == LIBRARY
    ours = {*FILES, *(file.name for file in to.glob(EVALUATIONS))}
    others = sorted({file.name for file in to.iterdir()} - ours) if earlier else []
    if not earlier or others:
        found = others[0] if others else "something else than an export"
        raise ValueError(f"--to {to}: holds {found}; name a new folder")
    if not force:
        raise ValueError(f"--to {to}: already holds an export; replace it with --force")


@dataclass(frozen=True)
class Options:
    """Write a trained classifier as safetensors, ONNX or a Hugging Face Hub folder."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run, a .safetensors file or a checkpoint-last.pt."""
    to: Path
    """Folder to write."""
    format: Literal["safetensors", "onnx", "hub"] = "safetensors"
    """Weights, an ONNX graph, or weights with a model card."""
    image_size: int | None = None
    """Height and width of the images; unset: those of the run."""
    push: str | None = None
    """Upload the hub folder to this model repository of the Hugging Face Hub: OWNER/NAME."""
    public: bool = False
    """Make a repository that --push creates public."""
    force: bool = False
    """Replace an earlier export."""

    def __post_init__(self) -> None:
        refuse_below(1, self, "image_size")
        if self.image_size is not None and self.image_size >= 2**31:
            raise ValueError(f"--image-size {self.image_size}: must be below 2^31")
        if self.push is not None and self.format != "hub":
            raise ValueError(f"--push {self.push}: needs --format hub")
        if self.push is not None and self.push.count("/") != 1:
            raise ValueError(f"--push {self.push}: write OWNER/NAME")
        if self.public and self.push is None:
            raise ValueError("--public: says who may see what --push uploads; add --push")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, arguments, "python -m reat_fast.export")
    if options.push is not None:
        import_extra("huggingface_hub", "--push", "hub")
    weights = checkpoint.find_weights(options.run)
    model, spec = checkpoint.load_model_and_spec(weights)
    description = describe(weights.parent, spec, weights)
    if options.image_size is not None:
        description["image_size"] = [options.image_size] * 2
    if None in description["image_size"]:
        raise ValueError(f"--image-size: {weights.parent} does not say how large its images are")
    refuse_to_overwrite(options.to, options.force)
    # They may have taken hours, and know their weights by a digest: they stay.
    kept = list(options.to.glob(EVALUATIONS))
    names = (*FILES, *(file.name for file in kept))
    with ended_by_sigterm(), replacing(options.to.resolve(), names) as folder:
        folder.mkdir()
        note = _write(folder, model, spec, description, options)
        for file in kept:
            shutil.copy2(file, folder)
    print(f"{options.to} written: {note}")
    if description["evaluation"] is None:
        print(
            f"no figures in it: {weights.parent} has no evaluation of {weights.name} as it is; "
            f"measure with: python -m reat_fast.evaluate {shlex.quote(str(weights))}"
        )
    if options.push is not None:
        print(f"uploaded to {push(options.to, options.push, public=options.public)}")
    return 0


def _write(
    folder: Path, model: Network, spec: ModelSpec, description: dict[str, Any], options: Options
) -> str:
    """Fill the folder; return what to tell of it."""
    if options.format == "onnx":
        write_text(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
        height, width = description["image_size"]
        return _write_onnx(folder / ONNX, model, (spec.in_channels, height, width))
    weights_file.save_weights(folder / checkpoint.EXPORTED, model, spec)
    own = {"weights_sha256": weights_sha256(folder / checkpoint.EXPORTED)}
    write_text(folder / DESCRIPTION, json.dumps(description | own, indent=2) + "\n")
    if options.format == "hub":
        name = (options.push or options.to.resolve().name).rpartition("/")[2]
        write_text(folder / CARD, model_card(name, description, options.push))
    return ", ".join(sorted(path.name for path in folder.iterdir()))


def _write_onnx(file: Path, model: Network, image_shape: tuple[int, int, int]) -> str:
    write_onnx(model, file, image_shape)
    if importlib.util.find_spec("onnxruntime") is None:
        return f'{ONNX}, not compared with PyTorch: pip install "reat-fast[onnx]"'
    generator = torch.Generator().manual_seed(0)
    # Neither batch has the size the graph was traced with.
    batches = [torch.rand(size, *image_shape, generator=generator) for size in (1, 5)]
    difference = max(compare_onnx(model, file, images) for images in batches)
    if not difference <= TOLERANCE:
        raise ValueError(
            f"--format onnx: onnxruntime's logits differ from PyTorch's by {difference:.1e} of the "
            f"largest, more than float32 explains ({TOLERANCE:.0e}); nothing was written"
        )
    return f"{ONNX}, whose logits in onnxruntime differ by {difference:.1e} of the largest"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

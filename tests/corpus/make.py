"""python -m tests.corpus.make: write the seeds of tests/fuzz.py again, each a few kilobytes."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

CORPUS = Path(__file__).parent
sys.path.insert(0, str(CORPUS.parent))

from made_run import made_run  # noqa: E402
from test_beton_file import KINDS, made_beton  # noqa: E402
from test_sources import idx_bytes, python2_batch, python3_batch, write_tar  # noqa: E402

from reat_fast import checkpoint  # noqa: E402
from reat_fast.checkpoint import ModelSpec  # noqa: E402

ROWS = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
LABELS = [0, 1]


def data_files() -> dict[str, bytes]:
    """Make the files of data sets, by TARGET/NAME."""
    idx = idx_bytes(np.arange(60, dtype=np.uint8).reshape(3, 4, 5))
    batch = python2_batch(ROWS, LABELS, "fine_labels")
    images, labels = ROWS[:, :48].reshape(2, 4, 4, 3), np.array(LABELS)
    arrays = {"x_train": images, "y_train": labels, "x_test": 255 - images, "y_test": labels}
    beton = {
        f"beton/whole-{kind}": _written(lambda path, kind=kind: made_beton(path, kind, 3))
        for kind in KINDS
    }
    tar = _written(lambda path: write_tar(path, {"train": batch, "test": batch}, "cifar/"))
    return beton | {
        "idx/whole": idx,
        "idx/whole-labels": idx_bytes(np.arange(5, dtype=np.uint8)),
        "idx/whole-gz": gzip.compress(idx, mtime=0),
        "idx/refused-size": bytes([0, 0, 8, 3]) + b"\xff" * 12,
        "cifar-python/whole": batch,
        "cifar-python/whole-python3": python3_batch(ROWS, LABELS, "fine_labels"),
        "cifar-python/whole-again": pickle.dumps(
            {b"data": ROWS, b"fine_labels": [np.int64(label) for label in LABELS]}, 2
        ),
        "cifar-python/whole-arrays": pickle.dumps(
            {"data": ROWS, "fine_labels": np.array(LABELS, ">i4")}, 5
        ),
        "cifar-python/refused-call": b"cbuiltins\neval\n(S'1'\ntR.",
        "cifar-python/refused-memo": b"}r\xff\xff\xff\xff.",
        "cifar-binary/whole": b"".join(bytes([7, k]) + ROWS[k].tobytes() for k in LABELS),
        "cifar-archive/whole": gzip.compress(gzip.decompress(tar), mtime=0),
        "npz/whole": _written(lambda path: np.savez(path, **arrays), ".npz"),
        "npz/whole-packed": _written(
            lambda path: np.savez_compressed(path, **arrays, class_names=["a", "b"]), ".npz"
        ),
        "npz/refused-object": _written(
            lambda path: np.savez(path, **arrays | {"y_test": np.array([print])}), ".npz"
        ),
        "list/whole": b"a.png 0\nb c.png 1\n",
        "list/whole-root": b"# root: .\na.png 0\nb c.png 1\n",
        "annotations/whole": b"a.png\tn01\t0\t0\t3\t3\nb c.png\tn02\t0\t0\t3\t3\n",
        "image/whole": _image("RGB"),
        "image/whole-palette": _image("P"),
        "beton-description/whole": json.dumps(
            {"version": 1, "class_names": ["a", "b", "c"], "train": {"images": 3}}
            | {"test": {"images": 3}}
        ).encode(),
    }


def run_files() -> dict[str, bytes]:
    """Make the files of a run, and what commands read, by TARGET/NAME."""
    torch.manual_seed(0)
    spec = ModelSpec("resnet8", 3, 1, 2, None, ("a", "b", "c"))
    model = spec.build()
    state = {"model": model.state_dict(), "model_spec": dict(vars(spec))}
    with tempfile.TemporaryDirectory() as name:
        folder = made_run(Path(name, "run"))
        made = {file.name: file.read_bytes() for file in folder.iterdir()}
        checkpoint.save_checkpoint(folder, state)
        checkpoint.save_weights(folder / "last.safetensors", model, spec)
        pt = (folder / checkpoint.CHECKPOINT).read_bytes()
        weights = (folder / "last.safetensors").read_bytes()
    return {
        "checkpoint/whole": pt,
        "checkpoint/refused-pickle": pickle.dumps({"model_spec": print}),
        "weights/whole": weights,
        "config/whole": made["config.json"],
        "config/refused-type": b'{"epochs": 2.5}',
        "evaluation/whole": made["evaluation.json"],
        "metrics/whole": made["metrics.csv"],
        "sweep/whole": b"# two runs\nreat --epochs 3\nlong: reat --milestones 1 2 # more\n",
        "flags/whole": b"quickstart\n--epochs\n3\n--no-fused\n--eps\n4/255\n--milestones\n1\n2",
        "flags/whole-many": b"--data\nx.npz\n--log\nwandb\n--imbalance=0.1\n--tail=none\n--quiet",
        "flags/refused": b"--lr\nnan",
    }


def _written(write: Callable[[Path], object], suffix: str = "") -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"file{suffix}")
        write(path)
        return path.read_bytes()


def _image(mode: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (6, 4), (1, 2, 3)).convert(mode).save(content, "PNG")
    return content.getvalue()


if __name__ == "__main__":
    for name, content in (data_files() | run_files()).items():
        (CORPUS / name).parent.mkdir(exist_ok=True)
        (CORPUS / name).write_bytes(content)

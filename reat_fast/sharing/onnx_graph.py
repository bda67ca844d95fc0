"""A classifier as an ONNX graph, and the comparison of the two."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from reat_fast.cli.extras import import_extra
from reat_fast.networks.architectures import Network

TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest logit.

Both sides sum in float32, in another order. A sum of n terms errs by about sqrt(n) 6e-8, at most
5e-6 for the 5,760 terms of wrn34_10, and over its 34 layers by sqrt(34) times that, 3e-5. A graph
that is wrong, in a BatchNorm's eps say, errs by 1e-3 and more.
"""


def write_onnx(model: Network, file: Path, image_shape: tuple[int, int, int]) -> None:
    """Write a classifier as an ONNX graph from images [batch, C, H, W] to logits [batch, K].

    The batch may have any size; image_shape (C, H, W) is fixed.
    Errors: ValueError where the packages that this needs are missing.
    """
    for package in ("onnx", "onnxscript"):
        import_extra(package, "--format onnx", "onnx")
    with _unheard():
        torch.onnx.export(
            model,
            (torch.rand(2, *image_shape),),
            file,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )


@contextmanager
def _unheard() -> Iterator[None]:
    """Keep back what the exporter remarks about its own making, in warnings and in the log."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def compare_onnx(model: Network, file: Path, images: Tensor) -> float:
    """Return the largest difference of an ONNX file's logits, relative to the largest logit.

    images [B, C, H, W] float32 in [0, 1] on the CPU.
    Errors: ValueError where onnxruntime is missing.
    """
    runtime = import_extra("onnxruntime", "comparing an ONNX file", "onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(images)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    if logits.shape != tuple(expected.shape):
        return math.inf
    difference = (torch.from_numpy(logits) - expected).abs().max()
    return float(difference / expected.abs().max())

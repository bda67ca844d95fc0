"""What a training step refuses of a program that calls it: networks, counts, images, labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from reat_fast.cli.terminal import some
from reat_fast.networks.architectures import Network


def checked_network(model: nn.Module) -> Network:
    """Return a network that has what a step asks of it; ValueError for one that lacks it."""
    dtypes = {weight.dtype for weight in model.parameters()}
    if any(dtype.itemsize < 4 for dtype in dtypes):
        raise ValueError(
            f"model: {', '.join(map(str, dtypes))}; give it in float32, precision bf16 computes in "
            "bfloat16"
        )
    last = getattr(model, "fc", None)
    if not hasattr(last, "out_features") or not hasattr(model, "forward_features_logits"):
        raise ValueError(
            f"model: {type(model).__name__} needs forward_features_logits(images), which returns "
            "features [B, D] beside logits [B, K], and its last linear layer as fc"
        )
    return cast("Network", model)


def refuse_moved_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Raise ValueError where a network has put others in the place of its buffers; may not sync.

    Copies of it, averages and graphs would go on reading those that it had.
    """
    places = {name: buffer.data_ptr() for name, buffer in buffers.items()}
    now = model.named_buffers()
    if moved := [name for name, buffer in now if places.get(name) != buffer.data_ptr()]:
        raise ValueError(
            f"model: {type(model).__name__} puts other tensors in the place of its buffers "
            f"({some(moved)}); write into those it has, as by copy_ or lerp_"
        )


def checked_counts(counts: Sequence[int], classes: int) -> list[int]:
    """Return training images per class as integers; raises ValueError for what are none."""
    sizes = torch.as_tensor(counts)
    whole = not sizes.is_floating_point() and not sizes.is_complex()
    if sizes.shape != (classes,) or not whole or int(sizes.min()) < 0:
        raise ValueError(
            f"counts: give a whole number of training images, 0 or more, for each of the {classes} "
            f"classes of the model, got {str(sizes.tolist()):.80}"
        )
    return [int(size) for size in sizes]


def refuse_misfits(
    images: Tensor, labels: Tensor, start: Tensor | None, dtype: torch.dtype, classes: int
) -> None:
    """Raise ValueError for what no step can be taken on; waits for no device.

    So values are looked at on a CPU alone. dtype, classes: those of the network.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        given = f"{type(images).__name__} and {type(labels).__name__}"
        raise ValueError(f"images, labels: {given}; give torch tensors")
    if images.dtype != dtype:
        raise ValueError(f"images: {images.dtype}; give {dtype} in [0, 1], bytes over 255")
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        given = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ValueError(f"labels: {given}; give int64, a class for each of {len(images)} images")
    if start is not None and start.shape != images.shape:
        raise ValueError(f"start: {list(start.shape)}; give the shape of images, as noise has")
    if not len(labels):
        raise ValueError("images: there are none; give at least one")
    if labels.device.type != "cpu":
        return
    if not ({*labels.tolist()} <= {*range(classes)}):
        raise ValueError(f"labels: must be numbers of classes, 0 to {classes - 1}")
    low, high = float(images.detach().min()), float(images.detach().max())
    if low < 0 or high > 1:  # NaN is counted, see EpochSums
        raise ValueError(
            f"images: pixels reach from {low:.3g} to {high:.3g}; give them in [0, 1], and "
            "normalise in the network"
        )

"""Bring CPU batches to the device: while one is trained on, the next is copied."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from reat_fast.loaders import Batch


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Give CPU batches on `device`; on the CPU they pass as they are.

    On CUDA they are copied from pinned memory on a stream of their own, one batch ahead, and are
    ready for the stream that is current when they are given. Their memory may be reused as soon as
    they are dropped. Abandoning this iterator closes `batches`.
    """
    return batches if device.type != "cuda" else _copied_ahead(batches, device)


def _copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    stream = torch.cuda.Stream(device)
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    try:
        for batch in batches:
            with torch.cuda.stream(stream):
                images = _copy(batch.images, device)
                labels, indices = _copy(batch.labels, device), _copy(batch.indices, device)
                copy = Batch(images, labels, indices, batch.gather), stream.record_event()
            if ahead is not None:
                yield _ready(*ahead, device)
            ahead = copy
        if ahead is not None:
            yield _ready(*ahead, device)
    finally:
        if isinstance(batches, Generator):
            batches.close()


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    # Pinned blocks return to PyTorch's cache only when the copies out of them are done.
    pinned = tensor if tensor.is_pinned() else tensor.pin_memory()
    return pinned.to(device, non_blocking=True)


def _ready(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    stream = torch.cuda.current_stream(device)
    stream.wait_event(copied)
    for tensor in (batch.images, batch.labels, batch.indices):
        tensor.record_stream(stream)  # or its memory would be free for the copy after next
    return batch

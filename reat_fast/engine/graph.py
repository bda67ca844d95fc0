"""CUDA graphs: warm up, capture and what a graph keeps from then on; of steps and of attacks."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

# Libraries choose algorithms and make their workspaces, and kernels are compiled, in the first
# steps; a capture must find all of that done.
WARM_UP_STEPS = 3

Outcome = TypeVar("Outcome")


@functools.cache
def attack_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which evaluations capture their attacks, and no step is captured.

    Freeing a graph frees the cuBLAS workspace of its stream, on which others may still count.
    """
    return torch.cuda.Stream(device)


def warm_up(body: Callable[[], object], stream: torch.cuda.Stream) -> None:
    """Run a body a few times on the stream on which it is going to be captured, and wait for it.

    One side stream for both: autograd remembers the stream on which it first met a weight.
    """
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_STEPS):
                body()
    finally:  # a body that failed has begun steps, which go on writing while they are undone
        torch.cuda.synchronize()
    gc.collect()  # what nobody holds any more would keep its memory through the captures to come


def can_capture(device: torch.device) -> bool:
    """Say whether steps on this device can be captured."""
    return device.type == "cuda"


def refuse_waiting(body: Callable[[], object]) -> None:
    """Run a body and raise RuntimeError where it waits for the device.

    Found here and not by a capture, which such a call breaks off and leaves PyTorch's allocator and
    generator in no defined state, while an evaluation is to go on.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype is PyTorch's own warning
        torch.cuda.set_sync_debug_mode("error")
        try:
            body()
        finally:
            torch.cuda.set_sync_debug_mode(before)


def record(
    graph: torch.cuda.CUDAGraph,
    body: Callable[[], Outcome],
    stream: torch.cuda.Stream,
    error_mode: str = "global",
    beside: torch.cuda.CUDAGraph | None = None,
) -> Outcome:
    """Capture a body that was warmed up on `stream`; return what it returned, which replays fill.

    error_mode: whose forbidden calls end the capture, see torch.cuda.graph. beside: a graph whose
    memory this one shares, recorded on the same stream.
    Errors: RuntimeError for a body that cannot be captured.
    """
    before, collects = torch.cuda.current_stream(), gc.isenabled()
    gc.disable()  # a tensor freed during the capture would be freed in the graph's pool
    try:
        pool = None if beside is None else beside.pool()
        with torch.cuda.graph(graph, pool, stream, capture_error_mode=error_mode):
            outcome = body()
    finally:
        if collects:
            gc.enable()
        torch.cuda.set_stream(before)  # where ending a capture fails, it stays on its own stream
    before.wait_stream(stream)
    return outcome


def baked_settings() -> tuple[object, ...]:
    """Return the settings that a graph keeps as they were when it was captured."""
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
    )


def refuse_changed_settings(baked: tuple[object, ...]) -> None:
    """Raise ValueError unless baked_settings() are those given."""
    if baked_settings() != baked:
        raise ValueError("TF32, cuDNN or determinism settings changed since the capture")

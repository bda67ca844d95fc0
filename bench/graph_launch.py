"""python -m bench.graph_launch: what launching the graph of a step costs the host, part by part.

Kernels in a row cost a graph little to launch, however many they are; what stands between them may
cost more. So graphs of small kernels are timed: with and without sums over many programs, each of
which fills a counter in memory first, and without the flag that PyTorch makes its graphs with. Then
the parts of a training step: the replay of its graph, the copies before it, the checks before
those. What its graph holds is counted.
"""

from __future__ import annotations

import ctypes
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from bench.host_time import host_seconds
from bench.ladder import Ladder, default_rung
from bench.records import Figure, record
from bench.step_kernels import launched
from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.engine.captured_step import CapturedStep, copy_positions_
from reat_fast.engine.graph import record as record_graph
from reat_fast.engine.graph import warm_up
from reat_fast.loaders import Batch

SHAPE = "resnet18 B=128 32x32 long-tailed"
SMALL = 1024
KERNELS = (200, 1000)
SUMS = 20
"""Sums among the largest number of kernels."""
SUMMED = 2**20
"""Numbers of a sum: more than one program adds."""


@dataclass(frozen=True)
class Options:
    """Time what a replayed step costs the host."""

    rung: str | None = None
    """A captured rung of bench_step in bfloat16; unset: the one that training takes."""
    repeats: int = 30
    """Launches of each row."""
    device: str = "auto"
    """auto, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.graph_launch")
    device = choose_device(options.device)
    if device.type != "cuda":
        raise ValueError(f"--device {options.device}: only a CUDA device has graphs")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    command = shlex.join(["python", "-m", "bench.graph_launch", *arguments])
    name = options.rung or default_rung(device)
    step = _step(name, device)
    # One after another: a graph writes to tensors that live as long as its generator waits.
    for what, call in chain(_small_graphs(device), _parts(step, name)):
        seconds = host_seconds(call, options.repeats + 5)[5:]  # the first find nothing in a cache
        is_of_step = what.startswith(name)
        shape, dtype = (SHAPE, "bfloat16") if is_of_step else (f"{SMALL} numbers", "float32")
        figure = Figure.of(f"host: {what}", seconds, "s", shape, dtype)
        print(
            f"{what:60}{figure.value * 1e6:8.1f} us, spread {figure.spread * 1e6:.1f}", flush=True
        )
        if options.keep:
            record([figure], device.type, command)
    return 0


def _small_graphs(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield graphs of small kernels, and one with sums between them, each good until the next."""
    x, many = torch.zeros(SMALL, device=device), torch.ones(SUMMED, device=device)

    def body(kernels: int, sums: int) -> None:
        for k in range(kernels):
            x.add_(1)
            if sums and k % (kernels // sums) == 0:
                many.sum()

    for kernels, sums in (*((number, 0) for number in KERNELS), (KERNELS[-1], SUMS)):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        warm_up(partial(body, kernels, sums), stream)
        record_graph(graph, partial(body, kernels, sums), stream)
        yield f"graph of {kernels:,} kernels" + f" and {sums} sums" * (sums > 0), graph.replay
    kept, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream(device)
    record_graph(kept, partial(body, KERNELS[-1], 0), stream)
    yield f"graph of {KERNELS[-1]:,} kernels, made without flags", launch_without_flags(kept)


def launch_without_flags(graph: torch.cuda.CUDAGraph) -> Callable[[], object]:
    """Make what launches a graph whose template was kept, and return its launch.

    PyTorch instantiates with cudaGraphInstantiateFlagAutoFreeOnLaunch, which is for graphs that
    allocate. CUDA launches straight-line graphs in constant time; whether it does so with that flag
    its documentation does not say.
    """
    runtime = ctypes.CDLL(f"libcudart.so.{str(torch.version.cuda).partition('.')[0]}")
    executable = ctypes.c_void_p()
    stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

    def call(name: str, *given: object) -> None:
        code = getattr(runtime, name)(*given)
        if code:
            raise RuntimeError(f"{name} failed with CUDA error {code}")

    template = ctypes.c_void_p(graph.raw_cuda_graph())
    call("cudaGraphInstantiate", ctypes.byref(executable), template, ctypes.c_ulonglong(0))
    call("cudaGraphUpload", executable, stream)
    return partial(call, "cudaGraphLaunch", executable, stream)


def _step(name: str, device: torch.device) -> tuple[CapturedStep, Batch]:
    """Capture a rung; prints what its graph holds."""
    ladder = Ladder(device, labels="long-tailed")
    # Those under other settings, TF32 and deterministic ones, would have to be called under them.
    rungs = {
        rung.name: rung
        for rung in ladder.rungs()
        if rung.name.startswith("captured") and rung.dtype == "bfloat16"
        if "deterministic" not in rung.name
    }
    if name not in rungs:
        raise ValueError(f"--rung {name!r}: captured ones are {', '.join(map(repr, rungs))}")
    kinds = Counter(kind_of(kernel) for kernel, _ in launched(rungs[name].make(), 1))
    held = ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
    print(f"{name}: {held}")
    return ladder.captured[name], ladder.batch


def kind_of(name: str) -> str:
    """Name what the profiler saw on the device."""
    kinds = {"Memset": "fills", "Memcpy": "copies"}
    return next((kind for begin, kind in kinds.items() if name.startswith(begin)), "kernels")


def _parts(
    captured: tuple[CapturedStep, Batch], name: str
) -> Iterator[tuple[str, Callable[[], object]]]:
    step, batch = captured
    recording = step._whole
    fixed = recording.batch

    yield f"{name}: the graph alone", recording.graph.replay
    yield f"{name}: copies of labels and indices", partial(copy_positions_, fixed, batch)
    yield f"{name}: checks of a batch", partial(recording.refuse_changes, batch)
    yield f"{name}: all of a step", partial(step.train_on, batch)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

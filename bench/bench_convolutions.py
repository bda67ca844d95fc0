"""python -m bench.bench_convolutions: every convolution of a network, one by one.

Forward, input gradient and weight gradient of each shape, in bfloat16 and channels_last on a GPU
(float32 on a CPU), against the matrix product measured in the same run. On a GPU a time is that of
a CUDA graph of several calls by device events, so that no launch from the host is in it, and the
kernel that took longest is named. The last lines of a network weigh the shapes by how often they
occur: what the convolutions of an attack iteration and of the update take without anything between.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.records import Figure, record
from bench.stopping import STOPPED, Stopped, stoppable
from bench.timing import matrix_rate, timed_calls
from bench.traced import KINDS, Convolution, Kind, convolutions
from reat_fast.cli.command import choose_device, parse_flags, refuse_below, run_command
from reat_fast.parity.rows import name_of

LONGEST_NAME = 160


@dataclass(frozen=True)
class Options:
    """Time every convolution of a network in each direction."""

    models: tuple[str, ...] = ("resnet18", "wrn28_10")
    """Networks of reat_fast.models."""
    batch_sizes: tuple[int, ...] = (128, 512)
    """Images per call."""
    size: int = 32
    """Height and width of the images."""
    shapes: int | None = None
    """Only so many shapes of each network, from the first layer on; unset: all."""
    calls: int = 10
    """Calls of which one time is the mean."""
    repeats: int = 7
    """Times of each row."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append each figure to bench/results as it becomes known."""

    def __post_init__(self) -> None:
        refuse_below(1, self, "shapes", "calls", "repeats")
        smallest = min(self.batch_sizes, default=0)
        if smallest < 1:
            raise ValueError(f"--batch-sizes {smallest}: must be at least 1")


@dataclass(frozen=True)
class Machine:
    """What is measured on, the rate of its matrix product in FLOP/s, and the command for rows."""

    device: torch.device
    dtype: torch.dtype
    peak: float
    command: str | None

    def keep(self, figure: Figure) -> None:
        """Append a figure to the results where a command is given."""
        if self.command is not None:
            record([figure], self.device.type, self.command)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_convolutions")
    command = shlex.join(["python", "-m", "bench.bench_convolutions", *arguments])
    device = choose_device(options.device)
    torch.backends.cudnn.benchmark = True
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    traced = {model: convolutions(model, options.size) for model in options.models}
    peak = matrix_rate(device)
    machine = Machine(device, dtype, peak, command if options.keep else None)
    print(f"{device}, {name_of(dtype)}, channels_last: matrix product {peak / 1e12:.3g} TFLOP/s")
    machine.keep(Figure("matrix product", peak / 1e12, 0.0, 6, "TFLOP/s", "", name_of(dtype)))
    try:
        with stoppable():
            for model, counts in traced.items():
                chosen = dict(list(counts.items())[: options.shapes])
                for batch_size in options.batch_sizes:
                    _table(model, chosen, batch_size, options, machine)
    except Stopped:
        print("stopped: the other shapes are left out")
        return STOPPED
    return 0


def _table(
    model: str,
    counts: dict[Convolution, int],
    batch_size: int,
    options: Options,
    machine: Machine,
) -> None:
    """Time the shapes of a network at one batch size; each is printed and kept as it is known."""
    device, dtype = machine.device, machine.dtype
    print(f"\n{model}, {batch_size} images")
    print(
        f"{'convolution':34}{'times':>6} {'computed':16}{'us':>9}{'spread':>8}{'TFLOP/s':>9}"
        f"{'of peak':>9}  kernel"
    )
    total = dict.fromkeys(KINDS, 0.0)
    flops = 0.0
    for shape, count in counts.items():
        work = shape.flops(batch_size)
        flops += count * work
        for kind, call in shape.calls(batch_size, device, dtype).items():
            times = timed_calls(call, device, options.calls, options.repeats)
            kernel = kernel_name(call) if device.type == "cuda" else ""
            row = f"{model} B={batch_size} {shape.name}, {count} times"
            row += f", {kernel}" if kernel else ""
            figure = Figure.of(f"convolution: {kind}", times, "s", row, name_of(dtype))
            machine.keep(figure)
            total[kind] += count * figure.value
            print(
                f"{shape.name:34}{count:6} {kind:16}{figure.value * 1e6:9.1f}"
                f"{figure.spread * 1e6:8.1f}{_rates(work, figure.value, machine.peak)}  {kernel}",
                flush=True,
            )
    _print_totals(total, flops, machine.peak)


def _print_totals(total: dict[Kind, float], flops: float, peak: float) -> None:
    sums: dict[str, tuple[Kind, ...]] = {
        "all, an attack iteration": ("forward", "input gradient"),
        "all, an update": KINDS,
    }
    for name, kinds in sums.items():
        time = sum(total[kind] for kind in kinds)
        print(f"{name:57}{time * 1e6:9.1f}{'':8}{_rates(len(kinds) * flops, time, peak)}")


def kernel_name(call: Callable[[], object]) -> str:
    """Name the kernel of a call that takes longest, and say how many others run beside it."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return longest_kernel(profiled.events() or [])


def longest_kernel(events: Iterable[Any]) -> str:
    """Return the name of the longest event on a device, without its arguments; "" if there is none.

    Names of templates say in brackets which kernel it is, so these stay.
    """
    ran = [event for event in events if event.device_type.name == "CUDA"]
    if not ran:
        return ""
    longest = max(ran, key=lambda event: event.time_range.elapsed_us())
    name = str(longest.name).removeprefix("void ").split("(")[0][:LONGEST_NAME]
    return name + (f" and {len(ran) - 1} more" if len(ran) > 1 else "")


def _rates(flops: float, time: float, peak: float) -> str:
    return f"{flops / time / 1e12:9.3f}{100 * flops / time / peak:7.1f} %"


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

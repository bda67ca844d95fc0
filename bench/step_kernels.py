"""python -m bench.step_kernels: which kernels one captured step runs, how often, for how long.

Needs a CUDA device. Rungs are those of the ladder that are captured; three replays of each are
profiled and averaged. Kernels of all libraries are named as the profiler names them. The sum of
their times is what the device is busy; the span between first and last, which profiling lengthens,
has the gaps as well.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from bench.ladder import Labels, Ladder, Step, default_rung
from reat_fast.cli.command import parse_flags, run_command
from reat_fast.env import environment
from reat_fast.storage.whole_files import write_text

REPLAYS = 3


@dataclass(frozen=True)
class Options:
    """List the kernels of a captured training step by the time they take."""

    rungs: tuple[str, ...] = ()
    """Captured rungs of the ladder of bench_step; unset: what training takes."""
    model: str = "resnet18"
    """A network of reat_fast.models."""
    batch_size: int = 128
    """Images per step."""
    steps: int = 10
    """Steps of the attack."""
    labels: Labels = "long-tailed"
    """Classes of the batch, as in bench_step."""
    most: int = 60
    """Kernels to list of each rung."""
    out: Path | None = None
    """JSON file for what is printed."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of a step: microseconds of all its launches together, and their number."""

    name: str
    microseconds: float
    launches: int


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.step_kernels")
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device was found: only there a step is captured")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda")
    ladder = Ladder(
        device,
        model=options.model,
        batch_size=options.batch_size,
        steps=options.steps,
        labels=options.labels,
    )
    rungs = {rung.name: rung for rung in ladder.rungs() if rung.name.startswith("captured")}
    found = {}
    for name in options.rungs or [default_rung(device)]:
        if name not in rungs:
            raise ValueError(f"--rungs {name!r}: captured ones are {', '.join(map(repr, rungs))}")
        kernels = summed(launched(rungs[name].make()), REPLAYS)
        busy = sum(kernel.microseconds for kernel in kernels)
        launches = sum(kernel.launches for kernel in kernels)
        print(f"{name}: {launches} launches a step, {busy:.0f} us together")
        for kernel in kernels[: options.most]:
            print(f"{kernel.microseconds:9.1f} us {kernel.launches:5} x  {kernel.name[:120]}")
        found[name] = {"microseconds": busy, "launches": launches} | {
            "kernels": [asdict(kernel) for kernel in kernels[: options.most]]
        }
    if options.out is not None:
        command = shlex.join(["python", "-m", "bench.step_kernels", *arguments])
        result = {"command": command, "environment": environment(), "rungs": found}
        write_text(options.out, json.dumps(result, indent=1) + "\n")
    return 0


def summed(launched: Iterable[tuple[str, float]], steps: int) -> list[Kernel]:
    """Sum up launches, given as names and microseconds, by kernel; the longest together first."""
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, microseconds in launched:
        times[name] += microseconds  # type: ignore[assignment]
        counts[name] += 1
    return [
        Kernel(name, round(time / steps, 1), round(counts[name] / steps))
        for name, time in times.most_common()
    ]


def launched(step: Step, steps: int = REPLAYS) -> list[tuple[str, float]]:
    """Return name and microseconds of everything that the device does in some steps."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    events = (event for event in profiled.events() or () if event.device_type == on_device)
    return [(event.name, event.time_range.elapsed_us()) for event in events]


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

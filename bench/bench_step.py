"""python -m bench.bench_step: the ladder from the loop-style reference to the captured step.

Every rung takes the same training step on the same batch. Warm-up stands apart; then the rungs take
turns, one timed step each, so that what the machine does meanwhile meets all of them. Rungs that
need a CUDA device are left out without one, as are the steps of others: plain PyTorch written well,
and the official code where --official names a clone of it. A rung that fails is named, and the exit
code is 1; the others are timed all the same. Asked to end (SIGTERM) before any is timed, it times
one step of each rung that is ready; it ends with what it has.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.host_time import host_seconds, host_waits
from bench.ladder import RECORDED, RECORDED_AFTER, Labels, Ladder, Rung, Step, default_rung
from bench.records import Figure, record
from bench.stopping import STOPPED, Stop, Stopped, stoppable
from bench.timing import matrix_rate, seconds, timed
from reat_fast.cli.command import choose_device, parse_flags, refuse_below, run_command
from reat_fast.cli.terminal import one_line
from reat_fast.engine.memory import keep_freed_memory
from reat_fast.models import create_model


@dataclass(frozen=True)
class Options:
    """Time one training step on every rung of the ladder."""

    model: str = "resnet18"
    """A network of reat_fast.models."""
    batch_size: int = 128
    """Images per step."""
    size: int = 32
    """Height and width of the images."""
    steps: int = 10
    """Steps of the attack."""
    labels: Labels = "uniform"
    """Classes of the batch: evenly drawn, or with the shares of CIFAR-10-LT of ratio 50, as in
    training. The reference and the official code loop over samples of rare classes."""
    repeats: int = 5
    """Timed steps of each rung."""
    rungs: tuple[str, ...] = ()
    """Names of the rungs to time; unset: all that this machine can take."""
    official: Path | None = None
    """A clone of the official REAT code, whose step is timed too."""
    seconds: float | None = None
    """Make no further rung ready after so many seconds, and say which are left out. Plain PyTorch
    under torch.compile is made ready first."""
    max_autotune: bool = False
    """Time plain PyTorch under torch.compile(mode="max-autotune") too, which compiles for
    minutes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results."""

    def __post_init__(self) -> None:
        refuse_below(1, self, "batch_size", "size", "repeats")


@dataclass
class Timing:
    """What was measured of one rung: seconds of each step and of the warm-up, and its memory."""

    rung: Rung
    step: Step
    warm_up: float
    mebibytes: float
    seconds: list[float] = field(default_factory=list)

    def figure(self, shape: str = "") -> Figure:
        """Return median and spread of the steps."""
        return Figure.of(f"step: {self.rung.name}", self.seconds, "s", shape, self.rung.dtype)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_step")
    device = choose_device(options.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        keep_freed_memory()  # for every rung but the first, which is as a script would run it
    ladder = Ladder(
        device,
        model=options.model,
        batch_size=options.batch_size,
        size=options.size,
        steps=options.steps,
        labels=options.labels,
        official=options.official,
        max_autotune=options.max_autotune,
    )
    flops = options.batch_size * _flops_per_image(options)
    with stoppable() as stop:
        timings, failed = _time(ladder, options, device, stop)
        stop.finish()
        _report(ladder, options, device, timings, flops, arguments)
    return STOPPED if stop.asked else int(failed > 0)


def _report(
    ladder: Ladder,
    options: Options,
    device: torch.device,
    timings: list[Timing],
    flops: float,
    arguments: Sequence[str],
) -> None:
    """Print the table and what the default costs the host, and keep the figures where asked to."""
    shape = f"{options.model} B={options.batch_size} {options.size}x{options.size}"
    if options.labels != "uniform":
        shape += f" {options.labels}"
    command = shlex.join(["python", "-m", "bench.bench_step", *arguments])

    def keep(figures: list[Figure]) -> None:
        if options.keep and figures:
            print(f"figures appended to {record(figures, device.type, command)}", flush=True)

    keep([timing.figure(shape) for timing in timings])  # first: nothing later can lose them
    _print(options, device, timings, flops, matrix_rate(device))
    default = default_rung(device)
    if any(timing.rung.name == default for timing in timings):
        keep(_host_figures(ladder, default, shape))


def _time(
    ladder: Ladder, options: Options, device: torch.device, stop: Stop
) -> tuple[list[Timing], int]:
    """Make the wanted rungs ready and time them in turns; returns how many failed beside it."""
    wanted = [r for r in ladder.rungs() if not options.rungs or r.name in options.rungs]
    unknown = sorted(set(options.rungs) - {rung.name for rung in wanted})
    if unknown:
        names = ", ".join(repr(rung.name) for rung in ladder.rungs())
        raise ValueError(f"--rungs {unknown[0]!r}: cannot be timed here; there are {names}")
    timings, failed = _all_ready(wanted, options, device, stop)
    timings.sort(key=lambda timing: wanted.index(timing.rung))
    with suppress(Stopped):
        for _ in range(1 if stop.asked else options.repeats):
            for timing in list(timings):
                try:
                    timing.seconds.append(seconds(timing.step, device))
                except Exception as error:  # such as what was ended while a graph was captured
                    failed += 1
                    timings.remove(timing)
                    print(f"{timing.rung.name}: failed: {one_line(error)[:500]}", flush=True)
    for timing in timings:
        if not timing.seconds:
            print(f"{timing.rung.name}: left out, asked to end", flush=True)
    timings = [timing for timing in timings if timing.seconds]
    if not timings:
        raise ValueError("no rung could be timed; the lines before say why")
    return timings, failed


def _all_ready(
    wanted: list[Rung], options: Options, device: torch.device, stop: Stop
) -> tuple[list[Timing], int]:
    """Make rungs ready until time is up; returns how many failed beside them."""
    timings: list[Timing] = []
    failed = 0
    began = time.perf_counter()
    for rung in sorted(wanted, key=lambda rung: rung.name not in RECORDED):
        late = options.seconds is not None and time.perf_counter() - began > options.seconds
        if stop.asked or (late and timings):
            why = "asked to end" if stop.asked else f"{options.seconds} s have passed"
            print(f"{rung.name}: left out, {why}", flush=True)
            continue
        try:
            timings.append(_made_ready(rung, device))
        except Stopped:
            print(f"{rung.name}: left out, asked to end", flush=True)
        except Exception as error:  # compilers and code of others: anything can come of it
            failed += 1
            print(f"{rung.name}: failed: {one_line(error)[:500]}", flush=True)
    return timings, failed


def _made_ready(rung: Rung, device: torch.device) -> Timing:
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    warm_up, step = timed(partial(_warmed_up, rung), device)
    memory = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    print(f"{rung.name}: ready after {warm_up:.1f} s", file=sys.stderr, flush=True)
    return Timing(rung, step, warm_up, memory / 2**20)


def _warmed_up(rung: Rung) -> Step:
    step = rung.make()
    for _ in range(RECORDED_AFTER if rung.name in RECORDED else 2):
        step()
    return step


def _host_figures(ladder: Ladder, default: str, shape: str) -> list[Figure]:
    """Measure and print what the captured step of the default costs the host."""
    if default not in ladder.captured:
        return []
    captured = ladder.captured[default]

    def step() -> object:
        return captured.train_on(ladder.batch)

    name = f"step: {default}, host"
    host, waits = Figure.of(name, host_seconds(step), "s", shape, "bfloat16"), host_waits(step)
    print(f"{default}: {host.value * 1e6:.0f} us of the host a step, which waits {waits} times")
    return [host, Figure(f"{name} waits", waits, 0, 1, "waits", shape, "bfloat16")]


def _flops_per_image(options: Options) -> float:
    """Count what the step needs: K forwards and input gradients, one forward and backward."""
    model = create_model(options.model, 10)
    images = torch.rand(2, 3, options.size, options.size, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        loss = model(images).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    once, back = forward.get_total_flops() / 2, backward.get_total_flops() / 2
    # The backward counted here holds both gradients; the attack needs that of the images only,
    # which costs a forward, and the update that of the weights too.
    return float(options.steps * 2 * once + once + back)


def _print(
    options: Options, device: torch.device, timings: list[Timing], flops: float, peak: float
) -> None:
    print(
        f"{options.model}, batch {options.batch_size}, {options.steps} attack steps on {device}, "
        f"{options.labels} labels: {flops / 1e12:.2f} TFLOP a step; matrix product "
        f"{peak / 1e12:.3g} TFLOP/s"
    )
    width = max(18, *(len(timing.rung.name) for timing in timings))
    print(
        f"{'rung':{width}} {'ms/step':>9} {'spread':>8} {'images/s':>9} {'TFLOP/s':>8} "
        f"{'of peak':>8} {'ratio':>6} {'MiB':>7} {'warm-up s':>10}"
    )
    first = timings[0].figure().value
    for timing in timings:
        figure = timing.figure()
        median = figure.value
        print(
            f"{timing.rung.name:{width}} {median * 1e3:9.1f} {figure.spread * 1e3:8.1f} "
            f"{options.batch_size / median:9.1f} {flops / median / 1e12:8.3f} "
            f"{100 * flops / median / peak:6.1f} % {first / median:6.2f} "
            f"{timing.mebibytes:7.0f} {timing.warm_up:10.1f}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

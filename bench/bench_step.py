"""python -m bench.bench_step: the ladder from the loop-style reference to the captured step.

Every rung takes the same training step on the same batch. Warm-up stands apart; then the rungs take
turns, one timed step each, so that what the machine does meanwhile meets all of them. Rungs that
need a CUDA device are left out without one.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args
from unittest import mock

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.records import Figure, record
from reat_fast.command import choose_device, parse_flags, run_command
from reat_fast.config import Config
from reat_fast.frozen import DEFAULT_FORM, Form, FrozenNetwork
from reat_fast.graph import CapturedStep
from reat_fast.kernels import triton_support
from reat_fast.loaders import Batch
from reat_fast.memory import give_back_freed_memory, keep_freed_memory
from reat_fast.models import create_model
from reat_fast.networks import Network
from reat_fast.reference_step import ReferenceStep
from reat_fast.step import TrainStep, make_optimizer

COUNTS = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]
Step = Callable[[], object]


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
    repeats: int = 5
    """Timed steps of each rung."""
    rungs: tuple[str, ...] = ()
    """Names of the rungs to time; unset: all that this machine can take."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results."""


class Unfolded:
    """The attack on the network itself in eval mode, with the face of FrozenNetwork."""

    def __init__(self, model: Network) -> None:
        self.model = model

    def refresh(self) -> None:
        """Nothing to take up: the weights are the network's own."""

    def __call__(self, images: Tensor) -> Tensor:
        self.model.eval()
        logits: Tensor = self.model(images)
        self.model.train()
        return logits


@contextmanager
def pytorch_forms() -> Iterator[None]:
    """Let every op take its PyTorch form on a GPU too."""
    with mock.patch.object(triton_support, "TRITON_INSTALLED", False):
        yield


class Ladder:
    """The rungs: each is a name and a step to call."""

    def __init__(self, options: Options, device: torch.device) -> None:
        made = torch.Generator().manual_seed(0)
        size = (options.batch_size, options.size, options.size, 3)
        images = torch.randint(0, 256, size, generator=made, dtype=torch.uint8)
        labels = torch.randint(0, 10, (options.batch_size,), generator=made)
        indices = torch.arange(options.batch_size)
        on_device = (tensor.to(device) for tensor in (images, labels, indices))
        self.batch = Batch(*on_device, gather=True)
        self.options, self.device = options, device

    def rungs(self) -> Iterator[tuple[str, Step]]:
        """Yield the rungs, from the plainest to the fastest this machine can take."""
        yield "loop reference", _as_scripts_run(self._rung(reference=True))
        if self.device.type == "cpu":
            yield "memory kept", self._rung(reference=True)
        yield "eager", self._plain(self._rung(folded=False))
        yield "channels_last", self._plain(self._rung(folded=False, channels_last=True))
        yield "folded", self._plain(self._rung(channels_last=True))
        yield "folded, compiled", self._plain(self._rung(channels_last=True, form="compiled"))
        if self.device.type == "cuda":
            yield "folded, cudnn", self._plain(self._rung(channels_last=True, form="cudnn"))
            yield "kernels", self._rung(channels_last=True)
            yield "kernels, bf16", self._rung(channels_last=True, precision="bf16")
            for form in get_args(Form):
                yield f"captured, {form}", self._captured("bf16", form)
            yield "captured, tf32", self._captured("tf32")

    def _rung(
        self,
        reference: bool = False,
        folded: bool = True,
        channels_last: bool = False,
        form: Form = DEFAULT_FORM,
        precision: Any = "float32",
    ) -> Step:
        step = self._step(reference, channels_last, precision, form)
        if not folded:
            step._frozen = Unfolded(step.model)  # type: ignore[assignment]
        return lambda: step.train_on(self.batch)

    def _step(
        self, reference: bool, channels_last: bool, precision: Any, form: Form = DEFAULT_FORM
    ) -> TrainStep:
        torch.manual_seed(0)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        model = create_model(self.options.model, 10).to(self.device, memory_format=layout)  # type: ignore[call-overload]
        config = Config(steps=self.options.steps, precision=precision, lr=1e-3)
        kind = ReferenceStep if reference else TrainStep
        step = kind(model, make_optimizer(model, config), COUNTS, config)
        step._frozen = FrozenNetwork(model, step._low, form)
        return step

    def _plain(self, step: Step) -> Step:
        def call() -> object:
            with pytorch_forms():
                return step()

        return call if self.device.type == "cuda" else step

    def _captured(self, precision: str, form: Form = DEFAULT_FORM) -> Step:
        tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        replayed = CapturedStep(self._step(False, True, precision, form), self.batch)
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return lambda: replayed._graph.replay()  # holds the step, whose memory the graph reads


def _as_scripts_run(step: Step) -> Step:
    """Let a step run with the memory settings that a process has by itself."""

    def call() -> object:
        give_back_freed_memory()
        try:
            return step()
        finally:
            keep_freed_memory()

    return call


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_step")
    device = choose_device(options.device)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    if device.type == "cpu":
        keep_freed_memory()  # for every rung but the first, which is as a script would run it
    ladder = Ladder(options, device)
    rungs: dict[str, Step] = {}
    warm_up, memory = {}, {}
    for name, step in ladder.rungs():
        if options.rungs and name not in options.rungs:
            continue
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        warm_up[name] = _seconds(step, device)
        warm_up[name] += _seconds(step, device)
        memory[name] = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
        rungs[name] = step
    if not rungs:
        raise ValueError(f"--rungs {' '.join(options.rungs)}: none of these can be timed here")
    times: dict[str, list[float]] = {name: [] for name in rungs}
    for _ in range(options.repeats):
        for name, step in rungs.items():
            times[name].append(_seconds(step, device))
    flops = options.batch_size * _flops_per_image(options)
    peak = _peak(device)
    _print(options, device, times, warm_up, memory, flops, peak)
    if options.keep:
        shape = f"{options.model} B={options.batch_size} {options.size}x{options.size}"
        figures = [
            Figure(
                f"step: {name}",
                statistics.median(t),
                max(t) - min(t),
                len(t),
                "s",
                shape,
                _dtype(name),
            )
            for name, t in times.items()
        ]
        command = shlex.join(["python", "-m", "bench.bench_step", *arguments])
        print(f"figures appended to {record(figures, device.type, command)}")
    return 0


def _dtype(rung: str) -> str:
    if "tf32" in rung:
        return "tf32"
    return "bfloat16" if "bf16" in rung or "captured" in rung else "float32"


def _seconds(step: Step, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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
    return options.steps * 2 * once + once + back


def _peak(device: torch.device) -> float:
    """Measure this machine's matrix product in FLOP/s: bf16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (3072, torch.float32)
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    seconds = min(_seconds(lambda: a @ b, device) for _ in range(6))
    return 2 * size**3 / seconds


def _print(
    options: Options,
    device: torch.device,
    times: dict[str, list[float]],
    warm_up: dict[str, float],
    memory: dict[str, int],
    flops: float,
    peak: float,
) -> None:
    print(
        f"{options.model}, batch {options.batch_size}, {options.steps} attack steps on {device}: "
        f"{flops / 1e12:.2f} TFLOP a step; matrix product {peak / 1e12:.3g} TFLOP/s"
    )
    print(
        f"{'rung':18} {'ms/step':>9} {'spread':>8} {'images/s':>9} {'TFLOP/s':>8} {'of peak':>8} "
        f"{'ratio':>6} {'MiB':>7} {'warm-up s':>10}"
    )
    first = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(
            f"{name:18} {median * 1e3:9.1f} {(max(seconds) - min(seconds)) * 1e3:8.1f} "
            f"{options.batch_size / median:9.1f} {flops / median / 1e12:8.3f} "
            f"{100 * flops / median / peak:6.1f} % {first / median:6.2f} "
            f"{memory[name] / 2**20:7.0f} {warm_up[name]:10.1f}"
        )


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""python -m bench.bench_masked_gradients: input gradients with a ReLU's mask in their kernel.

The attack computes an input gradient by cuDNN and masks it where the ReLU before was 0, in a pass
of its own; where two layers read that ReLU, the pass sums two gradients too. cuDNN's graph API can
take sum and mask into the convolution's kernel. PyTorch has no operator for it, so this calls it by
nvidia-cudnn-frontend, which the project needs nowhere else. For each shape of a network, on a GPU
in bfloat16 and channels_last: the bare input gradient, with the pass after it, and as one kernel,
the fastest of the plans that cuDNN offers, each held to float32.
"""

from __future__ import annotations

import importlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from bench.bench_convolutions import timed_calls
from bench.records import Figure, record
from bench.stopping import STOPPED, Stopped, stoppable
from bench.traced import Convolution, convolutions
from reat_fast.cli.command import choose_device, parse_flags, refuse_below, run_command
from reat_fast.engine.precision import full_precision
from reat_fast.kernels.masked_sum import masked_sum

NO_WORSE = 2.0
"""How many times as far from float32 a plan may be as the separate form, which rounds oftener."""


@dataclass(frozen=True)
class Options:
    """Time input gradients with and without the mask in their kernel."""

    model: str = "resnet18"
    """A network of reat_fast.models."""
    batch_size: int = 128
    """Images per call."""
    size: int = 32
    """Height and width of the images."""
    plans: int = 8
    """Plans of cuDNN that are tried for each shape and form."""
    seconds: float = 60.0
    """Try no further plan after so many seconds."""
    calls: int = 10
    """Calls of which one time is the mean."""
    repeats: int = 5
    """Times of each row."""
    device: str = "auto"
    """cuda or cuda:N; auto is the first."""
    keep: bool = False
    """Append each figure to bench/results as it becomes known."""

    def __post_init__(self) -> None:
        refuse_below(1, self, "batch_size", "size", "plans", "calls", "repeats")


@dataclass(frozen=True)
class Case:
    """One input gradient with what stands around it: all of it random, channels_last.

    out_gradient [B, C_out, H', W'], weights [C_out, C_in, k, k], relu and other [B, C_in, H, W]:
    the output of the ReLU before, and the gradient that another of its readers gives.
    """

    shape: Convolution
    out_gradient: Tensor
    weights: Tensor
    relu: Tensor
    other: Tensor

    @classmethod
    def of(cls, shape: Convolution, batch_size: int, device: torch.device) -> Case:
        """Draw the tensors of a shape."""

        def made(*size: int) -> Tensor:
            values = torch.randn(size, device=device).to(torch.bfloat16)
            return values.contiguous(memory_format=torch.channels_last)

        relu = made(batch_size, shape.in_width, shape.size, shape.size)
        return cls(
            shape,
            made(batch_size, shape.out_width, shape.out_size, shape.out_size),
            made(shape.out_width, shape.in_width, shape.kernel, shape.kernel),
            relu.relu(),
            torch.randn_like(relu),
        )

    def bare(self) -> Tensor:
        """Return the input gradient alone, by PyTorch's operator."""
        pairs = [[self.shape.stride] * 2, [self.shape.padding] * 2, [1, 1], False, [0, 0], 1]
        wanted = [True, False, False]
        found: Tensor = torch.ops.aten.convolution_backward(
            self.out_gradient, self.relu, self.weights, None, *pairs, wanted
        )[0]
        return found

    def true(self, readers: int) -> Tensor:
        """Return what `separate` does in float32, of the same tensors."""
        with full_precision():
            gradient: Tensor = conv2d_input(
                list(self.relu.shape),
                self.weights.float(),
                self.out_gradient.float(),
                self.shape.stride,
                self.shape.padding,
            )
        other = self.other.float() if readers == 2 else 0.0
        masked: Tensor = (gradient + other) * (self.relu > 0)
        return masked

    def separate(self, readers: int) -> Tensor:
        """Return it masked, summed before where the ReLU has two readers, as the attack does."""
        gradient = self.bare()
        other = self.other if readers == 2 else None
        return masked_sum(self.relu, gradient, other, out=gradient)


class OneKernel:
    """The same as Case.separate in one graph of cuDNN: its plans, each callable."""

    def __init__(self, case: Case, readers: int, cudnn: Any, handle: Any) -> None:
        self.cudnn, self.handle = cudnn, handle
        graph = cudnn.pygraph(
            handle=handle,
            name="masked_input_gradient",
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
        )

        def given(tensor: Tensor) -> Any:
            return graph.tensor(
                dim=list(tensor.shape),
                stride=list(tensor.stride()),
                data_type=cudnn.data_type.BFLOAT16,
            )

        loss, weights, relu = map(given, (case.out_gradient, case.weights, case.relu))
        self.tensors = {loss: case.out_gradient, weights: case.weights, relu: case.relu}
        shape = case.shape
        gradient = graph.conv_dgrad(
            loss=loss,
            filter=weights,
            padding=[shape.padding] * 2,
            stride=[shape.stride] * 2,
            dilation=[1, 1],
        )
        gradient.set_dim(list(case.relu.shape))
        if readers == 2:
            other = given(case.other)
            self.tensors[other] = case.other
            gradient = graph.add(a=gradient, b=other)
        masked = graph.relu_backward(loss=gradient, input=relu)
        masked.set_output(True).set_dim(list(case.relu.shape))
        masked.set_stride(list(case.relu.stride())).set_data_type(cudnn.data_type.BFLOAT16)
        self.found = torch.empty_like(case.relu)
        self.tensors[masked] = self.found
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        self.graph = graph
        self.count = int(graph.get_execution_plan_count())

    def plan(self, index: int) -> Callable[[], Tensor]:
        """Build one plan and return what runs it; whatever cuDNN raises for a plan it cannot."""
        self.graph.build_plan_at_index(index)
        size = int(self.graph.get_workspace_size_plan_at_index(index))
        workspace = torch.empty(max(size, 1), dtype=torch.uint8, device=self.found.device)

        def run() -> Tensor:
            stream = torch.cuda.current_stream().cuda_stream
            self.cudnn.set_stream(handle=self.handle, stream=stream)
            self.graph.execute_plan_at_index(self.tensors, workspace, index, self.handle)
            return self.found

        return run


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_masked_gradients")
    command = shlex.join(["python", "-m", "bench.bench_masked_gradients", *arguments])
    device = choose_device(options.device)
    if device.type != "cuda":
        raise ValueError("no CUDA device was found: cuDNN computes nowhere else")
    try:
        cudnn = importlib.import_module("cudnn")
    except ImportError as error:
        raise ValueError(f"pip install nvidia-cudnn-frontend ({error})") from error
    torch.backends.cudnn.benchmark = True
    handle = cudnn.create_handle()
    print(f"{options.model}, {options.batch_size} images, bfloat16; us, and plans that computed it")
    print(
        f"{'input gradient of':34}{'times':>6}{'readers':>8}{'bare':>8}{'and pass':>10}{'one':>8}"
    )
    until = time.perf_counter() + options.seconds
    try:
        with stoppable():
            for shape, count in convolutions(options.model, options.size).items():
                if shape.in_width == 3:  # no ReLU before the first
                    continue
                case = Case.of(shape, options.batch_size, device)
                for readers in (1, 2):
                    figures = _row(case, count, readers, options, (cudnn, handle), until)
                    if options.keep:
                        record(figures, "cuda", command)
    except Stopped:
        print("stopped: the other shapes are left out")
        return STOPPED
    return 0


def _row(
    case: Case, count: int, readers: int, options: Options, library: tuple[Any, Any], until: float
) -> list[Figure]:
    """Time one shape in all forms and print it; returns a figure for each form that computed."""
    device = case.relu.device

    def times(call: Callable[[], object]) -> list[float]:
        return timed_calls(call, device, options.calls, options.repeats)

    shape = f"{options.model} B={options.batch_size} {case.shape.name}, {count} times"
    shape += f", {readers} readers"
    forms = {"bare": times(case.bare), "and pass": times(lambda: case.separate(readers))}
    best, note = _fastest(case, readers, options, library, until, times)
    if best is not None:
        forms["one kernel"] = best
    figures = [
        Figure.of(f"input gradient: {form}", found, "s", shape, "bfloat16")
        for form, found in forms.items()
    ]
    cells = [f"{figure.value * 1e6:.1f}" for figure in figures] + ["none"]
    print(
        f"{case.shape.name:34}{count:6}{readers:8}{cells[0]:>8}{cells[1]:>10}{cells[2]:>8}  {note}",
        flush=True,
    )
    return figures


def _fastest(
    case: Case,
    readers: int,
    options: Options,
    library: tuple[Any, Any],
    until: float,
    times: Callable[[Callable[[], object]], list[float]],
) -> tuple[list[float] | None, str]:
    """Try the plans of cuDNN; returns the times of the fastest right one, and what was tried."""
    try:
        one = OneKernel(case, readers, *library)
    except Exception as error:  # the library's own kinds, of which it has several
        return None, f"no graph: {str(error).splitlines()[0][:90]}"
    best: list[float] | None = None
    expected = case.true(readers)

    def distance(found: Tensor) -> float:
        return float((found.float() - expected).norm() / expected.norm())

    allowed = NO_WORSE * distance(case.separate(readers))
    tried = right = 0
    problem = ""
    for index in range(min(one.count, options.plans)):
        if time.perf_counter() > until:
            problem = "time is up"
            break
        tried += 1
        try:
            run = one.plan(index)
            one.found.fill_(torch.nan)
            if not (found_distance := distance(run())) <= allowed:
                problem = f"plan {index} is off by {found_distance:.1e}, allowed {allowed:.1e}"
                continue
            found = times(run)
        except Exception as error:
            problem = str(error).splitlines()[0][:90]
            continue
        right += 1
        best = found if best is None else min(best, found, key=statistics.median)
    return best, f"{right} of {tried} tried, {one.count} there {problem}".rstrip()


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""Compile every kernel for GPUs that are not there, and print what came out.

    python -m bench.aot [--target cuda:80 cuda:90 cuda:100]

Every op is launched on CPU tensors, but a launch only compiles: Triton specialises the kernel on
the arguments as it would on a GPU, and the binary is disassembled with the tools in Triton's wheel.
So the table shows what the launchers really launch: registers, stack (spills), shared memory, how
wide global memory is accessed, which matrix instructions a dot became. It shows no speed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from reat_fast.engine.augment import apply_policy
from reat_fast.kernels import triton_support
from reat_fast.kernels.affine_relu import affine_relu_linked
from reat_fast.kernels.batchnorm import fused_batchnorm
from reat_fast.kernels.class_loss import MOST_CLASSES, class_loss
from reat_fast.kernels.conv3x3 import conv3x3, conv3x3_gradient
from reat_fast.kernels.l2 import l2_step_
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.masked_sum import masked_sum
from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.kernels.prepare import Noise, prepare
from reat_fast.kernels.resident_conv import launch_resident_conv
from reat_fast.kernels.stem_conv import stem_conv
from reat_fast.kernels.strided_conv import strided_conv
from reat_fast.kernels.strided_gradient import strided_gradient
from reat_fast.kernels.tail_penalty import Form, tail_penalty

TARGETS = ("cuda:80", "cuda:90", "cuda:100")
# Ops whose kernels are launched from one architecture on, or on one.
BOXES = ("conv3x3", "strided_conv", "strided_gradient")
ONLY = {**dict.fromkeys(BOXES, (90, 100)), "resident_conv": (90,)}
# Bytes of shared memory a block may have, from the table of technical specifications in NVIDIA's
# CUDA C++ programming guide. The compiler does not check it: a launch would fail.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Compiled:
    """One launch, compiled for one target."""

    case: str
    kernel: str
    target: str
    warps: int
    registers: int
    stack_bytes: int  # registers spilled to memory, and arrays that have no place in registers
    shared_bytes: int
    load_bits: Counter[int]  # width of a global access: number of instructions
    store_bits: Counter[int]
    dots: int  # dots in the source
    matrix_instructions: Counter[str]
    fused: int  # multiplications fused with an addition, those of a division among them


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the launches that stand for each op: its name with dtype and shape, and the call."""
    for batch, classes, dtype in (
        (128, 10, torch.float32),
        (128, 100, torch.float32),
        (1024, 1000, torch.bfloat16),
    ):
        logits = torch.zeros(batch, classes, dtype=dtype, requires_grad=True)
        offsets = torch.zeros(classes)
        launch = partial(class_loss, logits, _integers(batch), offsets=offsets, backend="triton")
        yield _name("class_loss", logits), launch
    for classes in (100, MOST_CLASSES):
        logits = torch.zeros(64, classes, requires_grad=True)
        offsets, weights = torch.zeros(classes), torch.ones(classes)
        launch = partial(
            class_loss,
            logits,
            _integers(64),
            offsets=offsets,
            weights=weights,
            label_smoothing=0.1,
            backend="triton",
        )
        yield _name("class_loss weighted, smoothed", logits), launch
    forms: tuple[Form, ...] = ("official", "pairwise")
    for form in forms:
        for batch, width, dtype in ((128, 512, torch.float32), (1024, 640, torch.bfloat16)):
            features = torch.zeros(batch, width, dtype=dtype, requires_grad=True)
            labels, counts = _integers(batch), _integers(100)
            launch = partial(tail_penalty, features, labels, counts, form=form, backend="triton")
            yield _name(f"tail_penalty {form}", features), launch
    noises: tuple[Noise, ...] = ("uniform", "normal")
    for noise in noises:
        images = torch.zeros(128, 32, 32, 3, dtype=torch.uint8)
        start = partial(prepare, images, _integers(128), 0, 0, 8 / 255, backend="triton")
        yield _name(f"prepare {noise}", images), partial(start, noise=noise)
    for policy, shape in (("autoaugment", (32, 32, 3)), ("randaugment", (28, 28, 1))):
        images = torch.zeros(128, *shape, dtype=torch.uint8)
        augment = partial(apply_policy, images, _integers(128), 0, 0, policy, backend="triton")
        yield _name(policy, images), augment
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        maps = torch.zeros(128, 64, 32, 32, dtype=dtype)
        yield _name("masked_sum", maps), partial(masked_sum, maps, maps, maps, backend="triton")
    for width, size, dtype, added in (
        (160, 32, torch.bfloat16, True),
        (640, 8, torch.bfloat16, True),
        (64, 32, torch.bfloat16, False),
        (16, 32, torch.float16, True),
        (160, 32, torch.float32, True),
    ):
        maps = _channels_last(128, width, size, size).to(dtype)
        case = "affine_relu" + ", sum" * added
        yield _name(case, maps), partial(_affine_relu, maps, maps if added else None)
    for shape, classes, dtype in (
        ((128, 512, 4, 4), 10, torch.bfloat16),
        ((128, 640, 8, 8), 100, torch.bfloat16),
        ((128, 2048, 4, 4), 10, torch.float16),
        ((128, 512, 7, 7), 200, torch.float32),
    ):
        maps = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight, bias = maps.new_zeros(classes, shape[1]), maps.new_zeros(classes)
        yield _name("pooled_linear", maps), partial(_there_and_back, maps, weight, bias)
    for width, size, dtype, added, relu in (
        (64, 32, torch.bfloat16, False, False),
        (64, 32, torch.bfloat16, False, True),
        (64, 32, torch.bfloat16, True, True),
        (512, 4, torch.bfloat16, True, True),
        (64, 32, torch.float32, True, True),
    ):
        maps = _channels_last(128, width, size, size).to(dtype)
        case = "batchnorm" + ", sum" * added + ", relu" * relu
        yield _name(case, maps), partial(_batchnorm, maps, maps if added else None, relu)
    for batch, width, size in ((128, 128, 16), (64, 160, 32)):
        maps = _channels_last(batch, width, size, size)
        weight, bias = _channels_last(width, width, 3, 3), maps.new_zeros(width)
        yield _name("conv3x3", maps), partial(conv3x3, maps, weight, bias, maps)
        yield _name("conv3x3 gradient", maps), partial(conv3x3_gradient, maps, weight, maps, maps)
    maps, beside = _channels_last(128, 64, 32, 32), _channels_last(128, 128, 16, 16)
    weights = _channels_last(128, 64, 3, 3), _channels_last(128, 64, 1, 1)
    launch = partial(strided_gradient, beside, weights[0], maps, maps, (beside, weights[1]))
    yield _name("strided_gradient", maps), launch
    launch = partial(strided_conv, maps, weights[0], beside[0, :, 0, 0], weights[1])
    yield _name("strided_conv", maps), launch
    for channels, dtype in ((3, torch.bfloat16), (1, torch.float16)):
        images = torch.zeros(128, channels, 32, 32, dtype=dtype)
        weight = _channels_last(64, 8, 3, 3).to(dtype)
        launch = partial(stem_conv, images, weight, weight[:, 0, 0, 0].clone(), (1, 1), (1, 1))
        yield _name("stem_conv", images), launch
    for size in (16, 32):
        maps, weight = _channels_last(32, 64, size, size), _channels_last(64, 64, 3, 3)
        forward = partial(launch_resident_conv, maps, weight, maps[0, :, 0, 0], maps, None, maps)
        yield _name("resident_conv", maps), partial(forward, gradient=False, programs=132)
        backward = partial(launch_resident_conv, maps, weight, None, maps, maps, maps)
        case = _name("resident_conv gradient", maps)
        yield case, partial(backward, gradient=True, programs=132)
        yield f"{case} overlapped", partial(backward, gradient=True, overlapped=True, programs=132)
    for step in (linf_step_, l2_step_):
        for dtype in (torch.float32, torch.bfloat16):
            adv = torch.zeros(128, 3, 32, 32)
            grad, nonfinite = adv.to(dtype), torch.zeros((), dtype=torch.int64)
            move = partial(step, adv, grad, adv.clone(), 2 / 255, 8 / 255, nonfinite=nonfinite)
            yield _name(f"{step.__name__} gradient", grad), partial(move, backend="triton")


def _affine_relu(maps: Tensor, residual: Tensor | None) -> None:
    leaf, scale = maps.detach().requires_grad_(), torch.zeros(maps.shape[1])
    outputs = affine_relu_linked(leaf, scale, scale, residual, backend="triton")
    torch.autograd.grad(outputs, leaf, (maps, maps))


def _there_and_back(maps: Tensor, weight: Tensor, bias: Tensor) -> None:
    leaf = maps.requires_grad_()
    logits = pooled_linear(leaf, weight, bias, masks_input=True, backend="triton")
    torch.autograd.grad(logits, leaf, logits.detach())


def _batchnorm(x: Tensor, residual: Tensor | None, relu: bool) -> None:
    """Launch the passes forward and backward."""
    weight, bias, mean, variance = torch.zeros(4, x.shape[1])
    x = x.detach().requires_grad_()
    given = (x, weight, bias, mean, variance, _integers(1)[0], 0.1, 1e-5, residual, relu)
    output = fused_batchnorm(*given, backend="triton")
    output.backward(torch.zeros_like(output))


def _name(op: str, tensor: Tensor) -> str:
    return f"{op} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _channels_last(*shape: int) -> Tensor:
    made = torch.zeros(shape, dtype=torch.bfloat16)
    return made.contiguous(memory_format=torch.channels_last)


def _integers(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)


def compile_cases(
    launches: Iterator[tuple[str, Callable[[], object]]],
    targets: Sequence[str] = TARGETS,
    fusion: bool = True,
) -> list[Compiled]:
    """Compile what the launches launch, for each target "cuda:<compute capability>".

    fusion: whether the compiler may fuse a multiplication and an addition, as in a launch.
    Raises RuntimeError where Triton is missing or interprets, or lacks the disassembler.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    rows = []
    for case, launch in launches:
        architectures = [int(target.removeprefix("cuda:")) for target in targets]
        only = ONLY.get(case.split()[0], architectures)
        architectures = [number for number in architectures if number in only]
        with _launches_compile(architectures, fusion) as seen:
            launch()
        rows += [_inspect(case, architecture, kernel) for architecture, kernel in seen]
    return rows


def why_not() -> str | None:
    """Say what this machine lacks to compile kernels, or nothing."""
    if not triton_support.TRITON_INSTALLED:
        return "needs Triton: pip install triton"
    if triton_support.INTERPRETED:
        return "needs a process without TRITON_INTERPRET=1"
    if not _disassembler().exists():
        return f"needs cuobjdump, which this build of Triton lacks at {_disassembler()}"
    return None


def _disassembler() -> Path:
    package = Path(triton_support.triton.__file__).parent
    return package / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Driver:
    """What Triton asks of a GPU's driver before it compiles; the device number is the target's."""

    architecture = 0

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        target = import_module("triton.backends.compiler").GPUTarget
        return target("cuda", self.architecture, 32)


@contextmanager
def _launches_compile(
    architectures: Sequence[int], fusion: bool
) -> Iterator[list[tuple[int, Any]]]:
    """Let a launch on CPU tensors compile for each architecture, and collect what it compiled."""
    runtime = triton_support.triton.runtime
    fake, run = _Driver(), runtime.JITFunction.run
    compiled: list[tuple[int, Any]] = []

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        options["enable_fp_fusion"] = fusion
        for fake.architecture in architectures:
            binary = run(kernel, *args, grid=grid, warmup=True, **options)
            compiled.append((fake.architecture, binary))

    with (
        mock.patch.object(runtime.driver, "_active", fake),
        mock.patch.object(runtime.JITFunction, "run", compile_only),
        # The ops then launch on CPU tensors, and launch the kernel itself.
        mock.patch.object(triton_support, "INTERPRETED", True),
    ):
        yield compiled


def _inspect(case: str, architecture: int, kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(kernel.asm["cubin"])
        binary.flush()
        command = [str(_disassembler()), "-sass", "-res-usage", binary.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    resources = re.search(r"REG:(\d+) STACK:(\d+)", listing)
    assert resources is not None, listing[:500]
    source = kernel.asm["ttir" if "ttir" in kernel.asm else "ttgir"]  # Gluon's has layouts
    # A line is an address, sometimes a predicate, and an instruction with its modifiers.
    instructions = re.findall(
        r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", listing, re.MULTILINE
    )
    return Compiled(
        case=case,
        kernel=kernel.metadata.name,
        target=f"cuda:{architecture}",
        warps=kernel.metadata.num_warps,
        registers=int(resources[1]),
        stack_bytes=int(resources[2]),
        shared_bytes=kernel.metadata.shared,
        load_bits=Counter(map(_bits, filter(_is("LDG", "LDGSTS"), instructions))),
        store_bits=Counter(map(_bits, filter(_is("STG"), instructions))),
        dots=len(re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot)\b", source)),
        matrix_instructions=Counter(
            instruction.split(".")[0]
            for instruction in instructions
            if re.match(r"(H|I|D|Q|O|UTC[A-Z]*?)G?MMA", instruction)
        ),
        fused=sum(map(_is("FFMA", "DFMA"), instructions)),
    )


def _is(*names: str) -> Callable[[str], bool]:
    return lambda instruction: instruction.split(".")[0] in names


def _bits(instruction: str) -> int:
    for modifier in instruction.split(".")[1:]:
        if re.fullmatch(r"[US]?(8|16|64|128)", modifier):
            return int(modifier.strip("US"))
    return 32


def print_table(rows: Sequence[Compiled]) -> None:
    """Print one line a launch and target."""
    form = "{:48} {:20} {:9} {:>5} {:>9} {:>7} {:>7}  {:22} {:22} {}"
    print(
        form.format(
            *("op, dtype, shape", "kernel", "target", "warps", "registers", "stack", "shared"),
            *("loads", "stores", "matrix instructions"),
        )
    )
    for row in rows:
        print(
            form.format(
                *(row.case, row.kernel.strip("_"), row.target, row.warps, row.registers),
                *(f"{row.stack_bytes} B", f"{row.shared_bytes} B"),
                *(_widths(row.load_bits), _widths(row.store_bits)),
                " ".join(f"{n} {name}" for name, n in row.matrix_instructions.items()) or "-",
            )
        )


def _widths(bits: Counter[int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(bits.items(), reverse=True)) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=__doc__.split("\n")[0])
    parser.add_argument("--target", nargs="+", default=TARGETS, metavar="cuda:80")
    arguments = parser.parse_args()
    reason = why_not()
    if reason is not None:
        sys.exit(f"bench.aot {reason}")
    print_table(compile_cases(cases(), arguments.target))


if __name__ == "__main__":
    main()

"""Compile every kernel for GPUs that are not there, and print what came out.

    python -m bench.aot [--target cuda:80 cuda:90 cuda:100]

Every op is launched on CPU tensors, but a launch only compiles: Triton specialises the kernel on
the arguments as it would on a GPU, and the binary is disassembled with the tools in Triton's wheel.
So the table shows what the launchers really launch: registers, instructions, stack (spills), shared
memory, how wide global memory is accessed, which matrix instructions a dot became; it shows no
speed.
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

from bench.launches import Launch, launches
from reat_fast.kernels import triton_support

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
    instructions: int  # of a thread, each once however often a loop runs it


def compile_launches(
    launched: Iterator[Launch],
    targets: Sequence[str] = TARGETS,
    fusion: bool = True,
) -> list[Compiled]:
    """Compile what is launched, for each target "cuda:<compute capability>".

    fusion: whether the compiler may fuse a multiplication and an addition, as in a launch.
    Raises RuntimeError where Triton is missing or interprets, or lacks the disassembler.
    """
    reason = why_not()
    if reason is not None:
        raise RuntimeError(reason)
    rows = []
    for case, launch in launched:
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


@functools.cache  # it takes as long as to compile, and a kernel is launched in several cases
def _disassembled(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
        binary.write(cubin)
        binary.flush()
        command = [str(_disassembler()), "-sass", "-res-usage", binary.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _inspect(case: str, architecture: int, kernel: Any) -> Compiled:
    listing = _disassembled(kernel.asm["cubin"])
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
        instructions=sum(instruction != "NOP" for instruction in instructions),
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
    form = "{:48} {:20} {:9} {:>5} {:>9} {:>12} {:>7} {:>7}  {:22} {:22} {}"
    print(
        form.format(
            *("op, dtype, shape", "kernel", "target", "warps", "registers", "instructions"),
            *("stack", "shared", "loads", "stores", "matrix instructions"),
        )
    )
    for row in rows:
        print(
            form.format(
                *(row.case, row.kernel.strip("_"), row.target, row.warps, row.registers),
                *(row.instructions, f"{row.stack_bytes} B", f"{row.shared_bytes} B"),
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
    print_table(compile_launches(launches(), arguments.target))


if __name__ == "__main__":
    main()

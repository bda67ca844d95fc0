"""python -m reat_fast.verify: hold every op and a whole training step against the reference.

On the machine it runs on: Triton kernels on a CUDA device, and on the CPU the PyTorch forms, or
the kernels in Triton's interpreter where TRITON_INTERPRET=1 is set, but for bfloat16, which it
computes wrongly (triton-lang/triton issue 11584). Exact values are float64, by formulas written
without the ops. Exit code 1 when any row falls short.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import torch

from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.engine.precision import full_precision
from reat_fast.kernels.triton_support import INTERPRETED, TRITON_INSTALLED, Backend
from reat_fast.parity.convolutions import compare_convolutions
from reat_fast.parity.images import compare_images
from reat_fast.parity.losses import compare_losses
from reat_fast.parity.maps import compare_maps
from reat_fast.parity.rows import Row
from reat_fast.parity.steps import compare_steps


@dataclass(frozen=True)
class Options:
    """Hold every op and a whole training step against the float64 reference on this machine."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print the rows as JSON."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 when every row holds, else 1."""
    options = parse_flags(Options, list(arguments), "python -m reat_fast.verify")
    device = choose_device(options.device)
    kernels = TRITON_INSTALLED and (device.type == "cuda" or INTERPRETED)
    backend: Backend = "triton" if kernels else "torch"
    with full_precision():
        rows = []
        if not options.json:
            how = "Triton kernels" if kernels else "PyTorch forms"
            print(f"{how}{' in the interpreter' if INTERPRETED else ''} on {device}")
            if INTERPRETED:
                print("bfloat16 left out: Triton's interpreter computes it wrongly")
            print(f"{'op':15} {'case':62} {'dtype':9} {'error':>9} {'at most':>9}")
        ops = compare_ops(device, backend)
        if INTERPRETED:
            ops = _without_bfloat16(ops)
        for row in chain(ops, compare_steps(device)):
            rows.append(row)
            if not options.json:
                print(
                    f"{row.op:15} {row.case:62} {row.dtype:9} {row.error:9.2g} "
                    f"{row.tolerance:9.2g}  {'ok' if row.ok else 'FALLS SHORT'}",
                    flush=True,
                )
    short = sum(not row.ok for row in rows)
    if options.json:
        print(json.dumps([{**asdict(row), "ok": row.ok} for row in rows], indent=2))
    else:
        print(f"{len(rows) - short} of {len(rows)} rows hold")
    return 1 if short else 0


def compare_ops(device: torch.device, backend: Backend) -> Iterator[Row]:
    """Yield the comparisons of every op, one after another as they are made."""
    for compare in (compare_images, compare_maps, compare_losses, compare_convolutions):
        yield from compare(device, backend)


def _without_bfloat16(rows: Iterable[Row]) -> Iterator[Row]:
    """Leave out what Triton's interpreter works on as if bits were integers, and its warnings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="triton.runtime.interpreter")
        yield from (row for row in rows if row.dtype != "bfloat16")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

"""What the compiler makes of every kernel: no spills, wide accesses, matrix instructions."""

from __future__ import annotations

import inspect
import pkgutil
import re
from importlib import import_module

import pytest
import torch
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

import reat_fast.kernels
from bench import aot
from bench.launches import launches
from reat_fast.kernels import linf, triton_support
from reat_fast.kernels.class_loss import class_loss_gradient

REASON = aot.why_not()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),  # it compiles every kernel for three GPUs, which takes minutes
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

# The kernels with, for loads and for stores, whether 16 bytes at a time are possible.
WIDE = {
    "_class_loss_kernel": (True, True),
    "_statistics_kernel": (True, False),  # stores two numbers a channel
    "_join_statistics_kernel": (True, False),
    "_normalise_kernel": (True, True),
    "_gradient_sums_kernel": (True, False),
    "_join_gradients_kernel": (True, False),
    "_input_gradient_kernel": (True, True),
    "_anchors_kernel": (True, False),  # stores one number a row
    "_official_kernel": (True, True),
    "_pairwise_kernel": (True, True),
    "_prepare_kernel": (False, True),  # gathers single bytes, flipped or not
    "_policy_kernel": (False, False),  # gathers single bytes, and may have three of a pixel
    "_linf_step_kernel": (True, True),
    "_l2_step_kernel": (True, True),
    "_masked_sum_kernel": (True, True),
    "_affine_relu_kernel": (True, True),
    "_affine_relu_gradient_kernel": (True, True),
    "_pooled_linear_kernel": (True, False),  # stores one number a class
    "_pooled_linear_gradient_kernel": (True, True),
    "_conv3x3_kernel": (False, False),  # fetches and stores boxes
    "_resident_conv_kernel": (False, False),
    "_strided_conv_kernel": (False, False),
    "_strided_gradient_kernel": (False, False),
    "_stem_conv_kernel": (False, True),  # gathers single numbers
}
# Boxes are there from Hopper on, and one kernel names instructions that only Hopper has.
MISSING = {
    "cuda:80": {f"_{name}_kernel" for name in (*aot.BOXES, "resident_conv")},
    "cuda:90": set(),
    "cuda:100": {"_resident_conv_kernel"},
}
# Bytes of stack that are no spills: sine and cosine reduce large angles in an array of 7 words.
ARRAYS = {"prepare normal uint8 [128, 32, 32, 3]": 32}
# Tiles are those of Hopper; after the sums, Blackwell spills a little of the largest.
SPILLED_BY_BLACKWELL = {
    "_conv3x3_kernel": 64,
    "_strided_gradient_kernel": 64,
    "_pooled_linear_kernel": 8,  # of float32 maps
}
# Rows of 40 bytes are not aligned to 16.
NARROW_ROWS = "class_loss float32 [128, 10]"


@pytest.fixture(scope="module")
def rows() -> list[aot.Compiled]:
    return aot.compile_launches(launches())


def test_every_kernel_of_the_project_is_compiled_for_every_target(rows: list[aot.Compiled]) -> None:
    launched = set()
    for module in pkgutil.iter_modules(reat_fast.kernels.__path__, "reat_fast.kernels."):
        source = inspect.getsource(import_module(module.name))
        launched |= set(re.findall(r"(_\w+_kernel)\)?\[", source))
    assert {row.kernel for row in rows} == launched == set(WIDE)
    for target in aot.TARGETS:
        compiled = {row.kernel for row in rows if row.target == target}
        assert compiled == launched - MISSING[target]


def test_no_kernel_spills_registers(rows: list[aot.Compiled]) -> None:
    for row in rows:
        few = SPILLED_BY_BLACKWELL.get(row.kernel, 0) if row.target == "cuda:100" else 0
        assert row.stack_bytes <= ARRAYS.get(row.case, 0) + few, row


def test_shared_memory_fits_the_target(rows: list[aot.Compiled]) -> None:
    for row in rows:
        assert row.shared_bytes <= aot.SHARED_MEMORY[int(row.target.removeprefix("cuda:"))], row


def test_global_memory_is_accessed_16_bytes_at_a_time_where_the_data_allow(
    rows: list[aot.Compiled],
) -> None:
    for row in rows:
        loads, stores = WIDE[row.kernel]
        if row.case != NARROW_ROWS:
            assert row.load_bits[128] > 0 or not loads, row
            assert row.store_bits[128] > 0 or not stores, row


def test_prepare_has_time_for_what_it_computes(rows: list[aot.Compiled]) -> None:
    (row,) = (r for r in rows if r.case.startswith("prepare uniform") and r.target == "cuda:90")
    values = sum(bits * number for bits, number in row.store_bits.items()) // (2 * 32)
    # An H200 has time for 83 instructions for each while it is written (docs/kernels.md).
    assert values == 16 and row.instructions < 55 * values


def test_a_policy_fuses_no_product_with_a_sum(rows: list[aot.Compiled]) -> None:
    fused = [row for row in rows if row.kernel == "_policy_kernel" and row.target == "cuda:90"]
    cases = {row.case for row in fused}
    chosen = ((case, launch) for case, launch in launches() if case in cases)
    without = aot.compile_launches(chosen, ["cuda:90"], fusion=False)
    assert [row.fused for row in fused] == [row.fused for row in without]
    assert len(fused) == 4  # two steps of either policy


def test_every_dot_becomes_matrix_instructions_of_its_target(rows: list[aot.Compiled]) -> None:
    expected = {"cuda:80": {"HMMA"}, "cuda:90": {"HGMMA"}, "cuda:100": {"UTCHMMA"}}
    dots = [row for row in rows if row.dots > 0]
    convolutions = (*aot.BOXES, "resident_conv", "stem_conv")
    assert {row.kernel for row in dots} == {
        *("_pairwise_kernel", *(f"_{name}_kernel" for name in convolutions))
    }
    for row in dots:
        assert set(row.matrix_instructions) == expected[row.target], row


def test_a_launch_leaves_nothing_with_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def kept() -> tuple[int, int]:
        return len(kernel_side_table.id_to_kernel), len(kernel_side_table.constant_args)

    wanted = ("masked_sum bfloat16", "pooled_linear bfloat16", "autoaugment", "linf_step_ gradient")
    chosen = [launch for case, launch in launches() if case.startswith(wanted)]
    logits, labels = torch.zeros(8, 16, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    chosen.append(lambda: class_loss_gradient(logits, labels, backend="triton"))
    before = kept()
    with aot._launches_compile([90], fusion=True) as seen, monkeypatch.context() as patch:
        # Launched as on a GPU, where wrap_triton does what it is for.
        patch.setattr(triton_support, "INTERPRETED", False)
        patch.setattr(triton_support, "kernel_runs_on", lambda tensor: True)
        patch.setattr(linf, "kernel_runs_on", lambda tensor: True)
        for launch in chosen:
            launch()
    assert len(seen) >= len(chosen) and kept() == before


def test_the_table_has_a_line_for_each_launch_and_target(
    rows: list[aot.Compiled], capsys: pytest.CaptureFixture[str]
) -> None:
    aot.print_table(rows[:3])
    header, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and header.startswith("op, dtype, shape")
    for line, row in zip(lines, rows, strict=False):
        assert line.startswith(row.case) and f"{row.registers} " in line

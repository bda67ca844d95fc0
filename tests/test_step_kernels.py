"""Kernels of a step summed up, and what is said without a device."""

from __future__ import annotations

import pytest

from bench import step_kernels
from bench.step_kernels import Kernel, summed
from reat_fast.cli.command import run_command


def test_launches_are_summed_by_kernel_and_averaged_over_steps() -> None:
    steps = 3 * [("conv", 10.0), ("add", 1.0), ("add", 2.0), ("conv", 12.5)]
    found = summed([*steps, ("once", 3.0)], 3)
    assert found == [Kernel("conv", 22.5, 2), Kernel("add", 3.0, 2), Kernel("once", 1.0, 0)]


def test_without_a_device_one_line_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_kernels.torch.cuda, "is_available", lambda: False)
    assert run_command(step_kernels.main, []) == 2
    assert "no CUDA device was found" in capsys.readouterr().err

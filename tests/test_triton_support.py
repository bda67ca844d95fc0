"""Which form of an op runs where."""

from __future__ import annotations

import pytest
import torch

from reat_fast.kernels.triton_support import INTERPRETED, use_triton


@pytest.mark.interpreter
def test_a_kernel_is_interpreted_only_where_it_is_asked_for() -> None:
    assert INTERPRETED
    chosen = [use_triton(backend, torch.zeros(1)) for backend in ("auto", "torch", "triton")]
    assert chosen == [False, False, True]


def test_tensors_on_a_cpu_take_pytorch_by_themselves() -> None:
    assert not use_triton("auto", torch.zeros(1))

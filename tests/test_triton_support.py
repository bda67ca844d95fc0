"""Which form of an op runs where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import pytest
import torch

from reat_fast.kernels import triton_support
from reat_fast.kernels.triton_support import INTERPRETED, is_current, use_triton


@pytest.mark.interpreter
def test_a_kernel_is_interpreted_only_where_it_is_asked_for() -> None:
    assert INTERPRETED
    chosen = [use_triton(backend, torch.zeros(1)) for backend in ("auto", "torch", "triton")]
    assert chosen == [False, False, True]


def test_tensors_on_a_cpu_take_pytorch_by_themselves() -> None:
    assert not use_triton("auto", torch.zeros(1))


def test_kernels_take_tensors_of_the_current_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_support, "TRITON_INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    here, there = (cast(torch.Tensor, Elsewhere(torch.device("cuda", k))) for k in (0, 1))
    assert use_triton("auto", here) and use_triton("triton", here)
    assert not use_triton("auto", there)  # PyTorch's form switches to the device by itself
    assert is_current(torch.device("cuda")) and is_current(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"tensors on cuda:1, .* torch\.cuda\.set_device\(1\)"):
        use_triton("triton", there)


@dataclass
class Elsewhere:
    """A tensor of which only the device is asked."""

    device: torch.device

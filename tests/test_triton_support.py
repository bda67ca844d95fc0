"""Which form of an op runs where."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch

from bench import aot
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


HANDLERS = """
import ctypes, signal
from bench import aot
from bench.launches import launches
from reat_fast.kernels.triton_support import triton

def handlers():
    found = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        action = (ctypes.c_void_p * 32)()  # struct sigaction begins with the handler
        assert ctypes.CDLL(None).sigaction(number, None, action) == 0
        found.append(action[0])
    return found

def asked(number, frame):
    pass

signal.signal(signal.SIGTERM, asked)
before = handlers()
"""
COMPILED = """
one = [launch for launch in launches() if launch[0].startswith("masked_sum")][:1]
aot.compile_launches(iter(one), ["cuda:80"])
print(handlers() != before)
triton.knobs.runtime.kernel_load_end_hook(None, None, "", None, "")
assert handlers() == before and signal.getsignal(signal.SIGTERM) is asked
"""
LAUNCHED = """
import torch
from reat_fast.kernels.linf import linf_step_
linf_step_(*(torch.rand(4, 3, 8, 8, device="cuda") for _ in range(3)), 0.1, 0.1)
assert handlers() == before
print(True)
"""


@pytest.mark.skipif(aot.why_not() is not None, reason=str(aot.why_not()))
@pytest.mark.parametrize(
    "part",
    [
        pytest.param(COMPILED, id="compiled"),
        pytest.param(LAUNCHED, id="launched", marks=pytest.mark.gpu),
    ],
)
def test_a_signal_that_comes_twice_finds_our_handler_after_a_kernel_was_compiled(
    part: str, tmp_path: Path
) -> None:
    """LLVM's, which it leaves behind, is reset to the default while it runs."""
    settings = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}  # what lies there is not compiled
    ended = subprocess.run(
        [sys.executable, "-c", HANDLERS + part], env=settings, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "True\n", "LLVM takes no signals any more: the hook may go"


@dataclass
class Elsewhere:
    """A tensor of which only the device is asked."""

    device: torch.device

"""torch.compile of a function as one graph, or one clear line where that cannot be."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from reat_fast.cli.terminal import first_line

Inputs = ParamSpec("Inputs")
Output = TypeVar("Output")


def compile_whole(function: Callable[Inputs, Output], flag: str) -> Callable[Inputs, Output]:
    """Compile a function of tensors as one graph, for each of their shapes anew.

    flag: what asked for it, for the errors. The first call on a shape compiles, the backward too,
    so a call in a capture needs one on the same shape before it.
    Errors of a call: ValueError where the function cannot be compiled as a whole.
    """
    # fullgraph: what it cannot take as a whole must raise rather than run in pieces.
    compiled = torch.compile(function, fullgraph=True, dynamic=False)

    def call(*inputs: Inputs.args, **named: Inputs.kwargs) -> Output:
        try:
            return compiled(*inputs, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = first_line(error)
            raise ValueError(
                f"{flag}: this network cannot be compiled as a whole ({reason}); leave it out"
            ) from error

    return call


def require_compiler(flag: str, device: torch.device) -> None:
    """Raise ValueError where torch.compile would miss the C++ compiler that it needs on a CPU."""
    words = shlex.split(os.environ.get("CXX", ""))
    wanted = words[0] if words else ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and shutil.which(wanted) is None:
        raise ValueError(f"{flag}: needs the C++ compiler {wanted} on a CPU; install it")

"""compute-sanitizer, NVIDIA's checker of what kernels read and write: where it is and its call."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path

NAME = "compute-sanitizer"
FOUND_SOMETHING = 9
"""Exit code where a kernel read or wrote what is not its own; else it is that of the program."""

TOOLKITS = Path("/usr/local")

ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""PyTorch's pool of memory would hide what is read beyond the end of a tensor."""

FILES = [
    f"tests/test_{op}.py"
    for op in (
        *("linf", "l2", "prepare", "class_loss", "tail_penalty", "philox"),
        *("pooled_linear", "masked_sum", "stem_conv", "strided_gradient", "strided_conv"),
        *("conv3x3", "batchnorm", "affine_relu", "policy", "resident_conv"),
    )
]
TESTS = "not any_ and not transforms and not many_samples and not equal_cross_entropy"
"""The kernels' tests on small sizes, without those that draw many examples or compile much."""


def compute_sanitizer() -> list[str] | None:
    """Return the call of compute-sanitizer in front of a program; None where it is not found.

    Errors of the CUDA interface are left out: libraries try what a driver may lack, and PyTorch
    raises what matters.
    """
    tool = next(_places(), None)
    if tool is None:
        return None
    flags = ["--tool", "memcheck", "--report-api-errors", "no"]
    return [str(tool), *flags, "--error-exitcode", str(FOUND_SOMETHING)]


def _places() -> Iterator[Path]:
    """Yield it from the path, the CUDA toolkits, and the packages that pip installs."""
    on_path = shutil.which(NAME)
    if on_path is not None:
        yield Path(on_path)
    folders = [folder / "bin" for folder in sorted(TOOLKITS.glob("cuda*"), reverse=True)]
    spec = importlib.util.find_spec("nvidia")
    for package in (spec and spec.submodule_search_locations) or ():
        folders += [file.parent for file in Path(package).rglob(NAME)]
    for folder in folders:
        found = shutil.which(NAME, path=str(folder))
        if found is not None:
            yield Path(found)

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
    for op in ("linf", "l2", "prepare", "class_loss", "tail_penalty", "philox")
]
SINGLE = [
    "tests/test_pooled_linear.py::test_sums_of_integers_are_exact",
    "tests/test_pooled_linear.py::test_maps_in_other_layouts_are_taken_too",
    "tests/test_masked_sum.py::test_other_layouts_and_no_images_are_taken_too",
    "tests/test_stem_conv.py::test_nan_spreads_as_far_as_the_kernel_reaches",
    "tests/test_strided_gradient.py::test_every_tile_gives_exact_sums_of_integers",
    "tests/test_strided_conv.py::test_every_tile_gives_exact_sums_of_integers",
    "tests/test_conv3x3.py::test_every_tile_gives_exact_sums_of_integers",
    "tests/test_batchnorm.py::test_a_large_mean_does_not_ruin_a_small_variance",
    "tests/test_affine_relu.py::test_integers_are_exact",
    "tests/test_policy.py::test_nothing_round_the_images_is_read_or_written",
    "tests/test_resident_conv.py::test_on_a_gpu_it_is_exact_and_float64_rounded_once",
]
"""Of kernels with hundreds of tests: every tile or layout once."""
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

"""Which tests run where, and poisoned memory.

Tests marked `interpreter` run Triton kernels on the CPU. Triton reads TRITON_INTERPRET when it is
imported, so they have a process of their own: `TRITON_INTERPRET=1 pytest` runs them and nothing
else, plain `pytest` skips them.
"""

from __future__ import annotations

import reat_fast  # isort: skip  # noqa: F401  # before torch loads threads that spin at every barrier

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_data import made_npz
from no_sync import NoSync
from torch import Tensor, nn

from reat_fast.kernels.triton_support import INTERPRETED, Backend

NEEDS_INTERPRETER = "needs TRITON_INTERPRET=1: make test runs them in a process of their own"

if os.environ.get("TRITON_INTERPRET") == "1" and not INTERPRETED:
    raise pytest.UsageError("TRITON_INTERPRET=1 is set, but Triton is not installed: unset it")
if INTERPRETED:
    import interpreter_bf16
    import interpreter_speed

    interpreter_bf16.install()
    interpreter_speed.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        others = [item for item in items if item.get_closest_marker("interpreter") is None]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.get_closest_marker("interpreter") is not None]
    for item in items:
        if item.get_closest_marker("interpreter") is not None and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason=NEEDS_INTERPRETER))
        if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def uninitialised_memory_is_poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty and its kin return, so that an element a kernel leaves unwritten shows.

    Floats become NaN, integers the largest of their type, booleans True.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


@pytest.fixture(autouse=True)
def arithmetic_is_pytorchs_own() -> None:
    """Take back what a run that was tested before has set: TF32 would round what comes after it."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def forbid_syncs() -> Iterator[None]:
    """Fail on any operation that would make a program wait for its device."""
    with NoSync():  # type: ignore[no-untyped-call]
        yield


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """Train the small network on which searches of AutoAttack are tested."""
    from made_search import trained_model  # kernels, which the interpreter is not ready for above

    return trained_model()


@pytest.fixture(scope="module")
def test_set() -> tuple[Tensor, Tensor]:
    """Make images and labels for it."""
    from made_search import made

    return made(60, seed=2)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small made data set, which no test may change."""
    return made_npz(tmp_path_factory.mktemp("data") / "made.npz")


@pytest.fixture(
    params=[
        pytest.param(("torch", "cpu"), id="torch"),
        pytest.param(("triton", "cpu"), id="interpreter", marks=pytest.mark.interpreter),
        pytest.param(("triton", "cuda"), id="gpu", marks=pytest.mark.gpu),
    ]
)
def place(request: pytest.FixtureRequest) -> tuple[Backend, str]:
    """Run a test once per form of an op: (backend, device)."""
    backend, device = request.param
    return backend, device


@pytest.fixture(
    params=[
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Run a test once per place where kernels of ours run."""
    place: str = request.param
    return place


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if type(tensor) is not Tensor:
            return tensor  # a compiler is tracing, and gives up at a write it cannot take away
        if tensor.is_floating_point() or tensor.is_complex():
            value: float = float("nan")
        elif tensor.dtype == torch.bool:
            value = True
        else:
            value = torch.iinfo(tensor.dtype).max
        with torch.no_grad():
            return tensor.fill_(value)

    return poisoned

"""The public names of the package, and its example."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata

import pytest

import reat_fast
from reat_fast.evaluate import evaluate
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.step import make_optimizer


def test_every_public_name_is_there_and_documented() -> None:
    for name in reat_fast.__all__:
        assert getattr(reat_fast, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'pdg'"):
        reat_fast.pdg  # noqa: B018


@pytest.mark.parametrize(
    "call",
    [reat_fast.TrainStep, reat_fast.autoattack, evaluate, make_optimizer, use_cosine_head],
)
def test_networks_of_ones_own_pass_a_type_checker(call: Callable[..., object]) -> None:
    first = next(iter(inspect.signature(call).parameters.values()))
    assert first.annotation == "nn.Module"


def test_notebooks_complete_public_names() -> None:
    assert {*reat_fast.__all__, "__version__"} <= {*dir(reat_fast)}


def test_a_checkout_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert reat_fast.__version__ == "unknown: not installed"


def test_the_example_runs() -> None:
    assert doctest.testmod(reat_fast).failed == 0
    assert doctest.testmod(reat_fast).attempted >= 4


def test_importing_the_package_does_not_load_torch() -> None:
    code = "import sys, reat_fast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_a_model_does_not_load_the_training() -> None:
    code = "import sys, reat_fast.checkpoint; sys.exit('reat_fast.training' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

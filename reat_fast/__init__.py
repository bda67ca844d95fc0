"""Adversarial training on long-tailed data, fast and checked against a plain reference.

>>> import torch
>>> from reat_fast import create_model, pgd
>>> model = create_model("resnet8", num_classes=10).eval()
>>> images, labels = torch.rand(2, 3, 32, 32), torch.tensor([3, 7])
>>> pgd(model, images, labels, eps=8 / 255, step_size=2 / 255, steps=10).shape
torch.Size([2, 3, 32, 32])
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Before torch loads its threads: by default they spin for milliseconds at every barrier, and where
# programs share the cores, each waits for threads that the others' spinning keeps from running.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

if sys.argv[:1] == ["-m"]:  # a command is starting, which takes seconds of imports

    def _report(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
        elif isinstance(error, ModuleNotFoundError) and error.name in ("torch", "numpy", "tyro"):
            lacks = f"error: {error.name} is not installed for {sys.executable}"
            print(f"{lacks}; take .venv/bin/python, which make train sets up", file=sys.stderr)
            sys.stderr.flush()
            os._exit(2)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = _report

if TYPE_CHECKING:  # `as`: what is imported so is a name of this package to type checkers
    __version__: str
    from reat_fast.attack import PGD as PGD
    from reat_fast.attack import pgd as pgd
    from reat_fast.checkpoint import load_model as load_model
    from reat_fast.data import load_dataset as load_dataset
    from reat_fast.data import longtail_counts as longtail_counts
    from reat_fast.data import longtail_indices as longtail_indices
    from reat_fast.engine.replayed_step import ReplayedStep as ReplayedStep
    from reat_fast.evaluation.autoattack import autoattack as autoattack
    from reat_fast.models import create_model as create_model
    from reat_fast.models import load_official as load_official
    from reat_fast.objective import balanced_softmax_loss as balanced_softmax_loss
    from reat_fast.objective import rbl_loss as rbl_loss
    from reat_fast.objective import rbl_weights as rbl_weights
    from reat_fast.objective import tail_penalty as tail_penalty
    from reat_fast.step import TrainStep as TrainStep

_HOMES = {
    "PGD": "attack",
    "ReplayedStep": "engine.replayed_step",
    "TrainStep": "step",
    "autoattack": "evaluation.autoattack",
    "balanced_softmax_loss": "objective",
    "create_model": "models",
    "load_dataset": "data",
    "load_model": "checkpoint",
    "load_official": "models",
    "longtail_counts": "data",
    "longtail_indices": "data",
    "pgd": "attack",
    "rbl_loss": "objective",
    "rbl_weights": "objective",
    "tail_penalty": "objective",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    # Looked up when used: the data commands need numpy alone and start without loading torch.
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"reat_fast.{_HOMES[name]}"), name)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("reat-fast")
    except metadata.PackageNotFoundError:
        return "unknown: not installed"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})  # for completion, which asks no name

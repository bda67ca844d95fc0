"""Which loader a run uses: the fastest that can carry its images, or the one asked for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from reat_fast.data import ImageSet
from reat_fast.loaders import Loader
from reat_fast.loaders.beton import BetonLoader
from reat_fast.loaders.dali import DaliLoader
from reat_fast.loaders.draws import FreshDraws
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.resident import ResidentLoader, shortage
from reat_fast.loaders.workers import WorkersLoader
from reat_fast.sources.beton_file import BetonImages

Rows = npt.NDArray[np.int64]

LOADERS = ("auto", "resident", "ffcv", "dali", "workers")


def make_loader(
    image_set: ImageSet,
    order: EpochOrder,
    device: torch.device,
    *,
    loader: str = "auto",
    workers: int = 2,
    beton: Path | None = None,
    rows: Rows | None = None,
) -> tuple[Loader, str]:
    """Make the loader asked for, and say in one line which it is and why.

    loader: one of LOADERS; auto is resident where the set fits on the device, else ffcv where FFCV
    is installed and the images lie in a .beton file, else dali where installed, else workers.
    workers: processes or threads that read. beton: a .beton file that holds the images of the set
    at positions `rows`; left out, the file that lazy images are read from. Raises ValueError in one
    line where the loader asked for cannot be.
    """
    if loader not in LOADERS:
        raise ValueError(f"--loader {loader!r} is unknown: use one of {', '.join(LOADERS)}")
    if beton is None and isinstance(image_set.images, BetonImages):
        beton, rows = image_set.images.path, image_set.images.rows
    name, reason = (loader, "as asked") if loader != "auto" else _choose(image_set, beton, device)
    made: Loader
    if name == "resident":
        made = ResidentLoader(image_set, order, device)
    elif name == "dali":
        made = DaliLoader(image_set, order, device, threads=workers)
    elif name == "workers":
        made = WorkersLoader(image_set, order, device, workers=workers)
    elif beton is not None:
        made = BetonLoader(image_set, order, device, path=beton, rows=rows, workers=workers)
    else:
        raise ValueError(
            "--loader ffcv reads .beton files: write one with `python -m reat_fast.convert` and "
            "give --dataset beton --data FOLDER"
        )
    drawn = made if order.sampler == "instance" else FreshDraws(made, device)
    return drawn, f"loader {name}: {reason}"


def _choose(image_set: ImageSet, beton: Path | None, device: torch.device) -> tuple[str, str]:
    lack = shortage(image_set, device)
    if lack is None:
        megabytes = image_set.images.nbytes / 1e6
        return "resident", f"{len(image_set):,} images, {megabytes:,.1f} MB, fit on {device}"
    if beton is not None and _installed("ffcv"):
        return "ffcv", f"{lack}; FFCV reads them from {beton.name}"
    missing = "no .beton file" if beton is None else "FFCV is not installed"
    if _installed("nvidia.dali"):
        return "dali", f"{lack}; {missing}, DALI is installed"
    return "workers", f"{lack}; {missing}, DALI is not installed"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package it lies in
        return False

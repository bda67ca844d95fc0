"""Each loader, crop and flip included, against the DataLoader of PIL images that is usual.

    python -m bench.bench_loaders [--images FILE.npz] [--keep]
    pytest bench/bench_loaders.py --benchmark-only

Loaders take turns, one epoch each, so that what the machine does meanwhile meets all of them. The
first epoch, in which processes start and FFCV compiles its pipeline, stands apart.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bench.records import Figure, record
from bench.timing import timed
from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.data import ImageSet, load_dataset
from reat_fast.engine.memory import keep_freed_memory
from reat_fast.kernels.prepare import prepare
from reat_fast.loaders.choose import make_loader
from reat_fast.loaders.order import EpochOrder
from reat_fast.sources.beton_folder import write_beton
from reat_fast.sources.lazy import FileImages

PIL = "PIL DataLoader"
LOADERS = (PIL, "resident", "ffcv", "dali", "workers")
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia.dali"}
QUALITY = 90  # of JPEG
Bytes = npt.NDArray[np.uint8]
Epoch = Callable[[int], int]
"""Go through one epoch and return how many images it had."""


@dataclass(frozen=True)
class Options:
    """Time every loader on raw and JPEG images, to augmented float batches."""

    images: Path | None = None
    """An .npz file with x_train and y_train; unset: images of noise."""
    count: int = 10_000
    """Images of an epoch."""
    sizes: tuple[int, ...] = (32, 64)
    """Height and width; images of another size are resized once, before."""
    batch_size: int = 128
    """Images per batch."""
    workers: int = 2
    """Processes or threads that read."""
    repeats: int = 5
    """Timed epochs of each loader."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results."""


@dataclass(frozen=True)
class Stored:
    """The same images as an array, as files and as a .beton file."""

    images: Bytes
    labels: npt.NDArray[np.int64]
    jpeg: bool
    paths: list[Path]
    beton: Path


class PilImages(Dataset[tuple[Tensor, int]]):
    """Crop, flip and convert one image at a time, as the official code does.

    Its transforms are torchvision's RandomCrop(size, padding=4), RandomHorizontalFlip() and
    ToTensor(), which on PIL images come down to these calls.
    """

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def __len__(self) -> int:
        return len(self.stored.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, ImageOps

        if self.stored.jpeg:
            image = Image.open(self.stored.paths[index]).convert("RGB")
        else:
            image = Image.fromarray(self.stored.images[index])
        size = image.width
        left, top = torch.randint(0, 9, (2,)).tolist()
        image = ImageOps.expand(image, 4).crop((left, top, left + size, top + size))
        if torch.rand(1) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        return pixels.float().div(255), int(self.stored.labels[index])


def store(images: Bytes, labels: npt.NDArray[np.int64], jpeg: bool, folder: Path) -> Stored:
    """Write images where each loader wants them; without FFCV no .beton file is written."""
    from PIL import Image

    folder.mkdir()
    stored = Stored(images, labels, jpeg, [], folder / "images.beton")
    if jpeg:
        for number, image in enumerate(images):
            stored.paths.append(folder / f"{number}.jpg")
            Image.fromarray(image).save(stored.paths[-1], quality=QUALITY)
    if importlib.util.find_spec("ffcv"):
        write_beton(stored.beton, images, labels, quality=QUALITY if jpeg else None)
    return stored


@contextlib.contextmanager
def opened(
    name: str, stored: Stored, batch_size: int, workers: int, device: torch.device
) -> Iterator[Epoch]:
    """Open a loader and give what goes through one epoch of it, augmentation included."""
    if name == PIL:
        yield _usual(stored, batch_size, workers, device)
        return
    size = stored.images.shape[1]
    as_files = stored.jpeg and name in ("dali", "workers")
    images = FileImages(stored.paths, size) if as_files else stored.images
    image_set = ImageSet(images, stored.labels)
    order = EpochOrder(stored.labels, batch_size)
    loader, _ = make_loader(
        image_set, order, device, loader=name, workers=workers, beton=stored.beton
    )
    seed, number = torch.zeros(2, dtype=torch.int64, device=device)

    def epoch(epoch: int) -> int:
        number.fill_(epoch)
        shown = 0
        for batch in loader.epoch(epoch):
            clean, _ = prepare(
                batch.images, batch.indices, seed, number, 0.0, gather=batch.gather, noise="none"
            )
            shown += len(clean)
        return shown

    try:
        yield epoch
    finally:
        loader.close()


def _usual(stored: Stored, batch_size: int, workers: int, device: torch.device) -> Epoch:
    loader = DataLoader(
        PilImages(stored),
        batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    return lambda epoch: sum(len(images.to(device, non_blocking=True)) for images, _ in loader)


def usable(name: str, stored: Stored) -> bool:
    """Whether a loader can be timed: resident decodes nothing, so it is timed on raw images."""
    if name == "resident" and stored.jpeg:
        return False
    try:
        return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None
    except ModuleNotFoundError:  # of the package it lies in
        return False


def rate(epoch: Epoch, number: int, device: torch.device) -> float:
    """Return the images per second of an epoch."""
    seconds, shown = timed(partial(epoch, number), device)
    return shown / seconds


def compare(stored: Stored, options: Options, device: torch.device) -> list[Figure]:
    """Time all loaders on the same images and print a table; returns its rows."""
    size, what = stored.images.shape[1], "JPEG" if stored.jpeg else "raw"
    print(f"\n{len(stored.labels):,} {what} images of {size}x{size}, batch {options.batch_size}")
    print(f"{'loader':16} {'images/s':>10} {'spread':>8} {'ratio':>6} {'first epoch s':>14}")
    with contextlib.ExitStack() as stack:
        epochs: dict[str, Epoch] = {}
        first: dict[str, float] = {}
        for name in LOADERS:
            if not usable(name, stored):
                continue
            way = opened(name, stored, options.batch_size, options.workers, device)
            first[name], epochs[name] = timed(partial(_after_first_epoch, way, stack), device)
        rates: dict[str, list[float]] = {name: [] for name in epochs}
        for number in range(1, options.repeats + 1):
            for name, epoch in epochs.items():
                rates[name].append(rate(epoch, number, device))
    shape, figures = f"B={options.batch_size} {size}x{size}", []
    usual = statistics.median(rates[PIL])
    for name, found in rates.items():
        figure = Figure.of(f"loader {what}: {name}", found, "images/s", shape)
        print(
            f"{name:16} {figure.value:10,.0f} {figure.spread:8,.0f} {figure.value / usual:6.2f} "
            f"{first[name]:14.2f}"
        )
        start = Figure(f"loader {what}, first epoch: {name}", first[name], 0.0, 1, "s", shape)
        figures += [figure, start]
    return figures


def _after_first_epoch(
    way: contextlib.AbstractContextManager[Epoch], stack: contextlib.ExitStack
) -> Epoch:
    epoch = stack.enter_context(way)
    epoch(0)
    return epoch


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, arguments, "python -m bench.bench_loaders")
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()  # as a run does
    command = shlex.join(["python", "-m", "bench.bench_loaders", *arguments])
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            images, labels = _images(options, size)
            for jpeg in (False, True):
                stored = store(images, labels, jpeg, Path(folder) / f"{size}{jpeg}")
                figures = compare(stored, options, device)
                if options.keep:  # now, for the program may be ended before the next
                    print(f"figures appended to {record(figures, device.type, command)}")
    return 0


def _images(options: Options, size: int) -> tuple[Bytes, npt.NDArray[np.int64]]:
    if options.images is None:
        made = np.random.RandomState(0)
        images = made.randint(0, 256, (options.count, size, size, 3)).astype(np.uint8)
        return images, np.arange(options.count) % 10
    from PIL import Image

    train = load_dataset("npz", options.images).train
    rows = np.random.RandomState(0).permutation(len(train))[: options.count]
    images = np.asarray(train.images[rows])
    if images.shape[1:] != (size, size, 3):
        resized = [Image.fromarray(i.squeeze()).convert("RGB").resize((size, size)) for i in images]
        images = np.stack([np.asarray(image) for image in resized])
    return images, train.labels[rows]


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("jpeg", [False, True], ids=["raw", "jpeg"])
def test_loader(benchmark: Any, tmp_path: Path, name: str, jpeg: bool) -> None:
    images, labels = _images(Options(count=2_000), 32)
    stored = store(images, labels, jpeg, tmp_path / "stored")
    if not usable(name, stored):
        pytest.skip(f"{name} cannot be timed here on such images")
    device = choose_device("auto")
    benchmark.group = "JPEG" if jpeg else "raw"
    with opened(name, stored, 128, 2, device) as epoch:
        rates: list[float] = []
        benchmark.pedantic(
            lambda: rates.append(rate(epoch, len(rates), device)), rounds=5, warmup_rounds=1
        )
    benchmark.extra_info["images_per_second"] = round(statistics.median(rates[1:]))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

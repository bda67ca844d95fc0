"""python -m bench.bench_epoch: a whole epoch with its evaluation, ours and the official one.

An epoch of CIFAR-10-LT of ratio 50, then PGD-20 on the balanced test set, on random images: how
long that takes depends on neither. Ours gathers and augments its images in the clock; the official
loader is left out of it. Warm-up, capture included, stands apart. The official code needs a CUDA
device and a clone of it: --official.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from bench.official import Official, as_loaded
from bench.records import Figure, record
from bench.stopping import STOPPED, Stopped, stoppable
from bench.timing import seconds
from reat_fast.cli.command import choose_device, parse_flags, refuse_below, run_command
from reat_fast.config import Config
from reat_fast.data import ImageSet, longtail_counts
from reat_fast.engine.memory import keep_freed_memory
from reat_fast.engine.precision import Precision, use_precision
from reat_fast.engine.replayed_step import ReplayedStep
from reat_fast.evaluate import Attack, evaluate
from reat_fast.loaders import Batch
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.resident import ResidentLoader
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.step import TrainStep, make_optimizer

CLASSES, SIZE = 10, 32
EVALUATED = 500
"""Images per batch of our evaluation, as python -m reat_fast.evaluate has it."""
PRECISIONS: tuple[Precision, ...] = ("bf16", "tf32", "float32")
"""What our evaluation can search in, that of a CPU last; the official one takes TF32."""


@dataclass(frozen=True)
class Options:
    """Time an epoch of training and the evaluation after it."""

    model: str = "resnet18"
    """A network of reat_fast.models."""
    batch_size: int = 128
    """Images per step; the official evaluation takes batches of this size too."""
    largest: int = 5000
    """Training images of the largest class; the smallest has a fiftieth."""
    test_images: int = 10_000
    """Images of the test set."""
    steps: int = 10
    """Steps of the attack in training; in the evaluation they are 20."""
    repeats: int = 3
    """Timed epochs of ours; of the official code it is one."""
    official: Path | None = None
    """A clone of the official REAT code."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results."""

    def __post_init__(self) -> None:
        refuse_below(1, self, "batch_size", "test_images", "repeats")
        refuse_below(50, self, "largest")


@dataclass(frozen=True)
class Sets:
    """The made data: training images per class, training and test set."""

    counts: list[int]
    train: ImageSet
    test: ImageSet


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_epoch")
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    sets = _made(options)
    config = Config(steps=options.steps, lr=1e-3, batch_size=options.batch_size)
    use_precision(config, device)
    official = None
    if options.official is not None:
        official = Official(options.official, options.model, sets.counts, config, device)
    print(
        f"{options.model}, {len(sets.train):,} training images in batches of {options.batch_size}, "
        f"PGD-20 on {len(sets.test):,} test images, on {device}"
    )
    command = shlex.join(["python", "-m", "bench.bench_epoch", *arguments])
    report = partial(_report, device=device, command=command if options.keep else None)
    ours: list[Figure] = []
    theirs: list[Figure] = []
    code = 0
    try:
        with stoppable():
            for figures in _ours(options, sets, config, device):
                report(figures)
                ours += figures
                # Right after the first evaluation, whose arithmetic is the default.
                if official is not None and len(ours) > 1 and not theirs:
                    theirs = _theirs(options, sets, official)
                    report(theirs)
    except Stopped:
        print("stopped: what does not stand above is left out")
        code = STOPPED
    for figure in ours if theirs else ():
        if "with evaluation" in figure.what:
            ratio = theirs[-1].value / figure.value
            print(f"{theirs[-1].what} takes {ratio:.2f} times as long as {figure.what}")
    return code


def _report(figures: list[Figure], device: torch.device, command: str | None) -> None:
    """Print figures, and append them to the results where a command is given."""
    for figure in figures:
        print(f"{figure.what:44} {figure.value:9.3f} s, spread {figure.spread:.3f}", flush=True)
    if command is not None:
        print(f"figures appended to {record(figures, device.type, command)}", flush=True)


def _made(options: Options) -> Sets:
    made = np.random.default_rng(0)

    def images(labels: np.ndarray) -> ImageSet:
        pixels = made.integers(0, 256, (len(labels), SIZE, SIZE, 3), dtype=np.uint8)
        return ImageSet(pixels, labels.astype(np.int64))

    counts = longtail_counts(options.largest, CLASSES, 0.02)
    test = np.arange(options.test_images) % CLASSES
    return Sets(counts, images(np.repeat(np.arange(CLASSES), counts)), images(test))


def _ours(
    options: Options, sets: Sets, config: Config, device: torch.device
) -> Iterator[list[Figure]]:
    """Time our epochs, then evaluations whose attack searches in one arithmetic after another."""
    torch.manual_seed(0)
    model = create_model(options.model, CLASSES).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = TrainStep(model, make_optimizer(model, config), sets.counts, config)
    order = EpochOrder(sets.train.labels, options.batch_size)
    loader = ResidentLoader(sets.train, order, device)
    first = next(loader.epoch(0))
    taken = ReplayedStep(step)
    short = _shortened(first, len(sets.train) % options.batch_size)
    for batch in (first, short, short):  # when it comes again it is recorded
        taken.train_on(batch)
    training = [
        seconds(partial(_epoch, taken, loader, number), device) for number in range(options.repeats)
    ]
    yield [_figure(options, "epoch: ours, training", training)]
    for precision in PRECISIONS if device.type == "cuda" else PRECISIONS[-1:]:
        _evaluation(model, sets.test.evenly(EVALUATED), precision)
        evaluation = partial(_evaluation, model, sets.test, precision)
        tested = [seconds(evaluation, device) for _ in range(options.repeats)]
        name = f"evaluation in {precision}"
        both = [a + b for a, b in zip(training, tested, strict=True)]
        yield [
            _figure(options, f"epoch: ours, {name}", tested),
            _figure(options, f"epoch: ours, with {name}", both),
        ]


def _shortened(batch: Batch, rest: int) -> Batch:
    """Return the last batch of an epoch."""
    size = rest or len(batch.labels)
    return Batch(batch.images, batch.labels[:size], batch.indices[:size], batch.gather)


def _epoch(step: ReplayedStep, loader: ResidentLoader, epoch: int) -> None:
    for batch in loader.epoch(epoch):
        step.train_on(batch)


def _evaluation(model: Network, test: ImageSet, precision: Precision) -> None:
    attacks = [Attack.from_name(name, 8 / 255, 2 / 255) for name in ("clean", "pgd20")]
    evaluate(model, test, attacks, CLASSES, batch_size=EVALUATED, precision=precision)


def _theirs(options: Options, sets: Sets, official: Official) -> list[Figure]:
    """Time an epoch of the official code and its evaluation, whose batches lie ready."""
    mixed = np.random.default_rng(0).permutation(len(sets.train))
    training = _on_host(sets.train, mixed, options.batch_size)
    test = _on_host(sets.test, np.arange(len(sets.test)), options.batch_size)

    def train() -> None:
        for images, labels in training:
            official.step(images, labels)

    def attack() -> None:
        for images, labels in test:
            official.evaluate(images, labels)

    for _ in range(2):
        official.step(*training[0])
        official.evaluate(*test[0])
    found = {"training": seconds(train, official.device)}
    found["evaluation"] = seconds(attack, official.device)
    found["with evaluation"] = sum(found.values())
    return [_figure(options, f"epoch: official, {n}", [s], "tf32") for n, s in found.items()]


def _on_host(
    image_set: ImageSet, rows: np.ndarray, batch_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return batches as the official loader gives them."""
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    chosen = [image_set.take(batch) for batch in batches]
    return [
        (as_loaded(torch.from_numpy(np.asarray(batch.images))), torch.from_numpy(batch.labels))
        for batch in chosen
    ]


def _figure(options: Options, what: str, times: list[float], dtype: str = "") -> Figure:
    shape = (
        f"{options.model} B={options.batch_size} {SIZE}x{SIZE}, largest class {options.largest}, "
        f"{options.test_images} test images"
    )
    return Figure.of(what, times, "s", shape, dtype)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

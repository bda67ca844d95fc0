"""The programs of bench/gpu.py: what each runs, how long it should take, and in which call it is.

A call has at most 10 minutes and there are six, so the first holds what decides most. Estimates
are seconds on one H100: of verify, step and evaluation near what they took there, of reat-plus
near what it took on an H200, of other trainings and attacks reckoned from those of their kind, the
rest guesses. Those of a call fit its 9.25 minutes together, limits need not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from bench.sanitizer import ENVIRONMENT, FILES, SINGLE, TESTS, compute_sanitizer
from reat_fast.checkpoint import has_checkpoint


@dataclass(frozen=True)
class Options:
    """Run every check and measurement that needs a CUDA device."""

    out: Path
    """Folder for logs, tables, runs and summary.json; the same one for all calls."""
    call: Literal[1, 2, 3, 4, 5, 6] = 1
    """Which: what decides most, reat-plus, single kernels, the rest, reat-plus of seeds 1 and 2."""
    data: Path | None = None
    """CIFAR-10 as .npz (x_train, y_train, x_test, y_test) for the trainings; unset: none is run."""
    official: Path | None = None
    """A clone of the official REAT code, whose step and epoch are timed too."""
    flags: str = ""
    """Further flags for the trainings, in one string, such as --update-form compiled."""
    parts: tuple[str, ...] = ()
    """Names of the parts to run, of whichever call; unset: all of the call."""
    minutes: float = 9.25
    """The part that runs when so many minutes have passed is ended, and no other begins."""


@dataclass(frozen=True)
class Part:
    """One program of the suite: seconds is its limit, estimate what it should take."""

    name: str
    arguments: list[str]
    seconds: int
    estimate: int = 0
    call: int = 1
    lacks: str = ""
    """What it needs and has not got; it is named and not run."""
    under: list[str] = field(default_factory=list)
    """Another program that runs it."""
    environment: dict[str, str] = field(default_factory=dict)


WIDE = (
    *("captured, triton", "captured, triton, fused update"),
    *("captured, cudnn", "captured, eager", "baseline, eager"),
)
"""Rungs of the ladder that WideResNet climbs too."""

WHOLE = ("captured, cudnn", "captured, triton, fused update", "baseline, max-autotune")
"""The defaults, before Hopper and on it, beside what compiles for minutes."""

ALL_FILES = ("--continue-on-collection-errors",)
"""A file of tests whose imports are missing leaves the others."""

LENIENT = "--import-mode=importlib"
"""The addopts of pyproject.toml without what a missing plugin would break."""

TOOLS = {
    "pytest": "the parts tests, kernels and sanitizer",
    "pytest_benchmark": "the part kernels",
    "xdist": "tests running side by side, about three minutes",
    "pytest_timeout": "the limit of each test; that of the part stays",
    "hypothesis": "the tests in files that import it, those of most kernels among them",
    "PIL": "the part loaders, and tests in files that import it",
}
"""Packages that the parts use beside those of the run time, and what is lost without them."""

STEP = ["-m", "bench.bench_step", "--labels", "long-tailed", "--keep"]
"""Classes as in training: the plain and the official form loop over samples of rare ones."""


def parts(options: Options) -> Iterator[Part]:
    """Yield the parts of all calls, each call's by weight.

    What an earlier part or call left in the folder is looked up when the turn of a part comes.
    """
    yield from _first_call(options)
    yield from _second_call(options)
    yield from _third_call(options)
    yield from _fourth_call(options)
    for seed in (1, 2):
        yield from _call_of_seed(options, seed, 4 + seed)


def _first_call(options: Options) -> Iterator[Part]:
    yield Part("verify", ["-m", "reat_fast.verify", "--device", "cuda"], 150, 40)
    tests = ["-m", "gpu", "tests", "--durations=5", *ALL_FILES]
    beside = ["-n", "6"] if installed("xdist") else []
    yield Part("tests", [*_pytest(limit=120), *tests, *beside], 240, 160)
    # The last rung begun at 120 s may compile for a minute, and then all are timed.
    yield Part("step", [*STEP, *_official(options), "--seconds", "120"], 240, 120)
    yield from _without_official(options, "official step", 1)
    # Not in true float32: the part epoch has that.
    evaluation = ["--repeats", "2", "--precisions", "bf16", "--batch-size", "1000", "--keep"]
    yield Part("evaluation", ["-m", "bench.bench_evaluation", *evaluation], 90, 20)
    yield _training(options, "reat", 1, ["reat"], seconds=240, estimate=140)


def _second_call(options: Options) -> Iterator[Part]:
    yield _attacks(options, "reat", 2, ["--subset", "5000"], seconds=240, estimate=90)
    # At the cost of at-bsl: 2,300 forward passes for each training image.
    yield _training(options, "reat-plus", 2, ["reat-plus"], seconds=320, estimate=240)
    yield _attacks(options, "reat-plus", 2, [], seconds=240, estimate=130)
    epoch = ["-m", "bench.bench_epoch", "--repeats", "1", "--keep", *_official(options)]
    yield Part("epoch", epoch, 150, 80, 2)
    yield from _without_official(options, "official epoch", 2)


def _third_call(options: Options) -> Iterator[Part]:
    own = ["-m", "bench.bench_conv3x3", "--keep"]
    yield Part("conv3x3", own, 180, 80, 3)
    convolutions = ["-m", "bench.bench_convolutions", "--keep"]
    yield Part("convolutions", convolutions, 150, 80, 3)
    wide = ["--model", "wrn28_10", "--repeats", "3", "--seconds", "80", "--rungs", *WIDE]
    yield Part("step-wrn", [*STEP, *wide], 150, 85, 3)
    yield Part("graph-launch", ["-m", "bench.graph_launch", "--keep"], 60, 35, 3)
    # Of a step of reat-plus, most of whose epochs have attacks of one step.
    listed = ["--steps", "1", "--out", str(options.out / "step-kernels.json")]
    yield Part("step-kernels", ["-m", "bench.step_kernels", *listed], 60, 25, 3)
    timed = ["--benchmark-only", f"--benchmark-json={options.out / 'kernels.json'}", "--keep"]
    yield Part("kernels", [*_pytest(), "bench/bench_kernels.py", *timed], 200, 70, 3)


def _fourth_call(options: Options) -> Iterator[Part]:
    yield _training(options, "at-bsl", 4, ["at-bsl"], seconds=270, estimate=170)
    some = ["--subset", "2000"]
    yield _attacks(options, "at-bsl", 4, some, seconds=120, estimate=40)
    sanitizer = compute_sanitizer()
    yield Part(
        "sanitizer",
        [*_pytest(), "-m", "gpu", *ALL_FILES, "-k", TESTS, *FILES, *SINGLE],
        200,
        110,
        4,
        "" if sanitizer else "no compute-sanitizer",
        sanitizer or [],
        ENVIRONMENT,
    )
    yield Part("loaders", ["-m", "bench.bench_loaders", "--keep"], 120, 40, 4)
    autotune = [*STEP, "--max-autotune", "--rungs", *WHOLE]
    yield Part("step-autotune", autotune, 400, 190, 4)


def _call_of_seed(options: Options, seed: int, call: int) -> Iterator[Part]:
    name, flags = f"reat-plus-seed{seed}", ["reat-plus", "--seed", str(seed)]
    yield _training(options, name, call, flags, seconds=320, estimate=240)
    yield _attacks(options, name, call, [], seconds=240, estimate=130)


def _official(options: Options) -> list[str]:
    return [] if options.official is None else ["--official", str(options.official)]


def _without_official(options: Options, name: str, call: int) -> Iterator[Part]:
    """Name what the part before leaves out."""
    if options.official is None:
        yield Part(name, [], 0, call=call, lacks="no --official")


def _training(
    options: Options, name: str, call: int, flags: list[str], *, seconds: int, estimate: int
) -> Part:
    """Train by flags in the folder of this suite, or go on with it where it was broken off."""
    folder = run_folder(options, name)
    arguments = ["-m", "reat_fast.train"]
    if has_checkpoint(folder):
        arguments += ["--resume", str(folder)]
    else:
        arguments += [*flags, "--fused", "--profile", "--data", str(options.data)]
        arguments += ["--run-dir", str(folder), *options.flags.split()]
    lacks = "no --data" if options.data is None else ""
    return Part(f"train-{name}", arguments, seconds, estimate, call, lacks)


def _attacks(
    options: Options, name: str, call: int, flags: list[str], *, seconds: int, estimate: int
) -> Part:
    """Attack a trained network, AutoAttack included, which goes on where it was cut short."""
    folder = run_folder(options, name)
    lacks = ""
    if not (folder / "evaluation.json").is_file():
        lacks = "no --data" if options.data is None else "no trained network"
    attack = ["-m", "bench.bench_trained", str(folder), "--keep", *flags]
    return Part(f"attack-{name}", attack, seconds, estimate, call, lacks)


def run_folder(options: Options, name: str) -> Path:
    """Name the folder of the run that a part trains."""
    return options.out / f"run-{name}"


def _pytest(limit: int | None = None) -> list[str]:
    """Return the call of pytest, with a limit in seconds for each test where that can be set."""
    call = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "bench.stopping"]
    if not installed("pytest_timeout"):  # its setting in pyproject.toml would be an error
        return [*call, "-o", f"addopts={LENIENT}"]
    return call if limit is None else [*call, f"--timeout={limit}"]


def installed(module: str) -> bool:
    """Say whether a package can be imported."""
    return importlib.util.find_spec(module) is not None

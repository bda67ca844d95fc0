"""python -m bench.bench_attacks RUN: our attacks beside pyautoattack and torchattacks, same images.

A table of robust accuracy and seconds: ours, the package's and their ratio. One model, the same
test images, float32 on both sides unless --precision says otherwise for ours. PGD, FGSM and LSA are
held against torchattacks (LSA: its PGD on a model with scaled logits), aa and l2aa against
pyautoattack; a package that is not installed or has no such attack leaves its cells empty.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from bench.records import Figure, record
from bench.timing import timed
from reat_fast import checkpoint
from reat_fast.cli.command import choose_device, parse_flags, run_command
from reat_fast.cli.radius import Radius
from reat_fast.config import Config
from reat_fast.data import load_run_data
from reat_fast.engine.precision import Precision
from reat_fast.evaluate import evaluate
from reat_fast.evaluation.attacks import AUTOATTACKS, LSA_SCALE, Attack
from reat_fast.evaluation.trial import Images
from reat_fast.evaluation.victim import attacked
from reat_fast.storage.config_file import from_json


@dataclass(frozen=True)
class Options:
    """Time our attacks and those of the packages on a trained classifier."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run."""
    attacks: tuple[str, ...] = ("fgsm", "pgd20", "lsa20", "aa")
    """fgsm, pgdN, lsaN, aa or l2aa."""
    subset: int = 200
    """Test images, evenly spread over the set."""
    eps: Radius = 8 / 255
    """L-infinity radius; that of l2aa is 128/255 in L2."""
    step_size: Radius = 2 / 255
    """Step of PGD and LSA."""
    precision: Precision = "float32"
    """Arithmetic in which our attacks search."""
    batch_size: int = 500
    """Images per batch, on both sides."""
    seed: int = 0
    """Seed, on both sides."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    keep: bool = False
    """Append the figures to bench/results."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, list(arguments), "python -m bench.bench_attacks")
    device = choose_device(options.device)
    model, spec = checkpoint.load_model_and_spec(checkpoint.find_weights(options.run), device)
    config = options.run / "config.json"
    trained = from_json(config.read_text("utf-8"), str(config)) if config.is_file() else Config()
    test = load_run_data(trained).test.evenly(options.subset)
    with attacked(model) as victim:
        clean, _ = Images(test, victim, options.seed, 0.0)(torch.arange(len(test)))
    labels = torch.from_numpy(test.labels).to(device)

    def ours(name: str) -> float:
        attack = Attack.from_name(name, options.eps, options.step_size)
        result = evaluate(
            model,
            test,
            [attack],
            spec.num_classes,
            eps=options.eps,
            seed=options.seed,
            batch_size=options.batch_size,
            precision=options.precision,
        )
        return float(result["attacks"][name]["overall"])

    def theirs(name: str) -> float | None:
        right = _package(name, model, clean.contiguous(), labels, options)
        return None if right is None else 100 * float(right.double().mean())

    print(f"{options.run}, {len(test)} images, {device}, ours in {options.precision}")
    print(f"{'attack':10}{'ours %':>9}{'package %':>11}{'ours s':>10}{'package s':>11}{'ratio':>8}")
    figures: list[Figure] = []
    for name in options.attacks:
        for warm_up in (ours, theirs):
            warm_up("fgsm")
        own_seconds, own = timed(partial(ours, name), device)
        other_seconds, other = timed(partial(theirs, name), device)
        print(_row(name, own, other, own_seconds, other_seconds), flush=True)
        what, shape = f"{options.run.name} {name}", f"{len(test)} images"
        figures.append(Figure(f"{what} ours", own_seconds, 0.0, 1, "s", shape, options.precision))
        if other is not None:
            figures.append(Figure(f"{what} package", other_seconds, 0.0, 1, "s", shape))
            figures.append(Figure(f"{what} ours - package", own - other, 0.0, 1, "points", shape))
    if options.keep:
        command = shlex.join(["python", "-m", "bench.bench_attacks", *arguments])
        print(f"figures appended to {record(figures, device.type, command)}")
    return 0


def _row(name: str, own: float, other: float | None, seconds: float, their_seconds: float) -> str:
    left = f"{name:10}{own:9.2f}"
    if other is None:
        return f"{left}{'-':>11}{seconds:10.1f}{'-':>11}{'-':>8}"
    ratio = their_seconds / seconds
    return f"{left}{other:11.2f}{seconds:10.1f}{their_seconds:11.1f}{ratio:8.1f}"


def _package(
    name: str, model: nn.Module, images: Tensor, labels: Tensor, options: Options
) -> Tensor | None:
    """Return which images stand against the package's attack, None where it is not installed."""
    attack = Attack.from_name(name, options.eps, options.step_size)
    package = "pyautoattack" if name in AUTOATTACKS else "torchattacks"
    if attack.loss == "cw" or name.startswith("l2pgd") or not find_spec(package):
        return None
    if name in AUTOATTACKS:
        from reat_fast.evaluation.packaged import package_autoattack

        return package_autoattack(
            model,
            images,
            labels,
            eps=attack.radius(options.eps),
            seed=options.seed,
            batch_size=options.batch_size,
            norm=attack.norm,
        )
    import torchattacks

    # eval(): the package gives back the mode of the outer module to those inside.
    victim = _Scaled(model).eval() if attack.loss == "lsa" else model
    torch.manual_seed(options.seed)
    adversary = torchattacks.PGD(
        victim, eps=options.eps, alpha=attack.step_size, steps=attack.steps
    )
    if name == "fgsm":
        adversary = torchattacks.FGSM(victim, eps=options.eps)
    right = [
        model(adversary(x, y)).argmax(1) == y
        for x, y in zip(
            images.split(options.batch_size), labels.split(options.batch_size), strict=True
        )
    ]
    return torch.cat(right)


class _Scaled(nn.Module):
    """A model whose logits are multiplied: PGD on it is the logit scaling attack."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        scaled: Tensor = LSA_SCALE * self.model(images)
        return scaled


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

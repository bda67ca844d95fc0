"""The configuration of a run: one flat dataclass, its presets, and the parser of the command line.

Every field is a flag. The text under a field is its help. Presets are instances, so a preset is
read as the list of what it changes. What a configuration may not say is in config_checks.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from reat_fast.cli.command import parse_flags
from reat_fast.cli.radius import Radius
from reat_fast.config_checks import refuse_misfits
from reat_fast.methods.presets import METHOD_PRESETS


@dataclass(frozen=True)
class Config:
    """Train an image classifier that is robust to adversarial examples on long-tailed data.

    Defaults are those of the preset that is named first, else of the one that a plain start takes.
    """

    dataset: str = "cifar10"
    """cifar10, cifar100, fashion-mnist, npz, folder, list, tiny-imagenet or beton."""
    data: Path | None = None
    """Folder, archive or .npz (x_train, y_train, x_test, y_test); unset: the usual places."""
    image_size: int | None = None
    """Pixels a side that image files are resized and cut to; unset: images of one size."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded instead of stopping."""
    imbalance: float = 0.02
    """Smallest over largest class of the training set, in (0, 1]: 0.02 is ratio 50, 1 balanced."""
    imbalance_profile: Literal["exp", "step", "as-is"] = "exp"
    """How class sizes fall off: exponentially, in one step after half of the classes, or as-is."""
    largest: int | None = None
    """Images of the largest class. Unset: as many as a class has, of uneven ones the smallest."""
    held_out: float = 0.05
    """Share of each training class kept for choosing the best epoch, at least an image of each; 0
    trains on everything."""
    split_seed: int = 0
    """Seed of the long-tailed subset; 0 is the subset that the official code draws."""

    model: str = "resnet18"
    """resnet8, resnet18, resnet34, resnet50, preact_resnet18, wrn28_10, wrn34_10, timm/NAME."""
    width: int | None = None
    """Channels of the first stage; unset: the network's own."""
    stem_stride: Literal[1, 2] | None = None
    """Stride of the first convolution; unset: the network's own, 2 in resnet8 and else 1."""
    small_stem: bool = False
    """Start a ResNet of timm with a 3x3 convolution and no pooling, for small images."""

    epochs: int = 80
    """Passes over the training images. With another number than the preset's, its milestones,
    --attack-from, --awp-from and --second-stage move in proportion."""
    batch_size: int = 128
    """Images per step, over all devices together."""
    accumulate: int = 1
    """Parts of a batch that are computed one after another, to fit into memory."""
    sampler: Literal["instance", "class-balanced", "square-root", "effective", "progressive"] = (
        "instance"
    )
    """Which images an epoch shows: each one once, or drawn with replacement by class."""
    drop_last: bool = False
    """Leave out the last batch of an epoch where it is short."""
    lr: float = 0.1
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Use Nesterov momentum."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter, BatchNorm included, as in the official code."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 sets no limit."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, with --objective bsl, ce and trades."""
    ema: float = 0.0
    """Decay of averaged weights, which are then the ones evaluated and saved; 0 keeps none. It acts
    after 9 decay / (1 - decay) steps, 8,991 of 0.999: before, a step counts for more."""
    schedule: Literal["multistep", "onecycle", "cosine", "constant"] = "multistep"
    """Learning rate: drops at the milestones, a linear ramp up and down, or a cosine."""
    milestones: tuple[int, ...] = (60, 75)
    """Epochs at which the multistep schedule multiplies the learning rate by gamma."""
    gamma: float = 0.1
    """Factor of the multistep schedule."""
    warmup: float = 0.25
    """Share of the run in which the onecycle schedule rises."""

    eps: Radius = 8 / 255
    """L-infinity radius of the adversarial examples, on images in [0, 1]."""
    step_size: Radius = 2 / 255
    """Length of one step of the attack, on images in [0, 1]."""
    steps: int = 10
    """Steps of the attack in training."""
    attack: Literal["pgd", "fgsm-rs", "n-fgsm", "free"] = "pgd"
    """How examples are made in training: pgd, one of two one-step attacks, or free, which takes the
    gradient of training itself."""
    attack_from: int = 0
    """The first so many epochs train on examples of n-fgsm, which cost one step; the others on
    those of --attack."""
    replays: int = 8
    """Updates on one batch with --attack free."""
    start: Literal["uniform", "normal", "none"] = "uniform"
    """Where PGD begins: U(-eps, eps), 0.001 N(0, 1), or the images themselves."""
    radius: Literal["same", "class"] = "same"
    """One radius for all images, or RobustLT's, which is larger for rare classes."""
    radius_alpha: float = 0.3
    """How far radii of classes go apart, in [0, 1]."""
    radius_warmup: float = 0.8
    """Share of the run over which radii of classes grow from 0."""
    attack_loss: Literal["auto", "ce", "bsl", "rbl", "rbl_offsets", "kl", "cosine"] = "auto"
    """What the attack maximises; auto is ce where REAT's rbl cannot change an example."""
    attack_batchnorm: Literal["eval", "train"] = "eval"
    """BatchNorm during the attack: running statistics, or the statistics of the attacked batch."""
    attack_form: Literal["auto", "eager", "compiled", "cudnn", "triton", "cpu"] = "auto"
    """How the attacked network computes: op by op, compiled, by fused cuDNN, by kernels of ours
    where they take a convolution (triton, from Hopper on), or in forms made for CPUs (cpu). auto is
    triton in bfloat16 on an H100 or H200, cudnn in bfloat16 on other GPUs, cpu in float32 on a CPU,
    and else eager."""
    update_form: Literal["auto", "eager", "fused", "compiled"] = "auto"
    """How the update computes: op by op, with BatchNorm, the sum and the ReLU behind it in one op
    of ours (fused, on a GPU), or compiled, once for each size of a batch. auto is fused where
    bfloat16 steps are replayed from a graph on an H100 or H200, unless BatchNorm is synchronised
    over several processes, and else eager."""

    objective: Literal["bsl", "ce", "trades", "mart", "robal", "taet"] = "bsl"
    """What training minimises; docs/methods.md has the formulas."""
    beta: float = 6.0
    """Factor of the divergence in trades, mart and robal."""
    margin: float = 0.1
    """Margin of robal."""
    margin_tau: float = 0.3
    """How much the margin of robal grows with the class size."""
    prior_tau: float = 1.5
    """Factor of the log prior in the loss of robal."""
    post_tau: float = 0.1
    """Factor of the log prior that a cosine head subtracts from its logits."""
    second_stage: int = 40
    """Epoch from which taet trains on adversarial examples."""
    head: Literal["linear", "cosine"] = "linear"
    """Classifier on top of the features."""
    head_scale: float = 10.0
    """Scale of the cosine head."""
    awp: float = 0.0
    """Adversarial weight perturbation: its length over the norm of the weights; 0 has none."""
    awp_from: int = 0
    """Weights are perturbed after so many epochs; those before cost no more than without --awp."""
    tail: Literal["official", "pairwise", "none"] = "official"
    """Feature penalty on tail classes: as the official code has it, per pair, or none."""
    tail_coefficient: float = 1.0
    """Factor of the tail penalty."""

    augment: bool = True
    """Random crop with padding 4 and horizontal flip."""
    policy: Literal["none", "randaugment", "autoaugment"] = "none"
    """Augmentation before crop and flip: RandAugment of 2 operations, or CIFAR-10's AutoAugment."""
    policy_magnitude: int = 8
    """Magnitude of RandAugment, 0 to 30."""
    loader: Literal["auto", "resident", "ffcv", "dali", "workers"] = "auto"
    """What brings images to the device, the same images where they are stored raw and at their
    size. auto: resident where they fit."""
    workers: int = 2
    """Threads or processes of a loader that reads files."""

    fused: bool = True
    """Train with the fused step, the default; --no-fused is the plain reference of REAT and of
    balanced softmax, to compare with."""
    precision: Literal["auto", "float32", "tf32", "bf16"] = "auto"
    """Arithmetic of the network; auto is bf16 on a GPU that has it (A100, RTX 30 and later), else
    float32, as with --no-fused. On a CPU bf16 is that of the attack alone; it is the faster where
    the CPU multiplies bfloat16."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the whole step as one CUDA graph; auto does on a GPU with --fused."""
    sync_batchnorm: bool = True
    """With several devices, normalise by the whole batch and not by each device's share."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; with several processes each takes a GPU of its own."""
    seed: int = 0
    """Seed of weights, order, augmentation and random starts."""

    evaluation: Literal["held-out", "official", "none"] = "held-out"
    """Chooses the best epoch: PGD-10 on held-out images, or (official) PGD-20 on the test set."""
    eval_every: int | None = None
    """Epochs between two evaluations; unset: 1 with --evaluation official, and 5 on the held-out
    images, where it is a fifth once the learning rate has fallen and the best epoch is sought."""
    select: Literal["best", "last"] = "best"
    """Which weights are evaluated on the test set at the end: last, or best, those of the largest
    robust accuracy on the held-out images since the learning rate fell to half its peak or less,
    or with --evaluation official on the test set, of all epochs."""
    eval_batch_size: int = 500
    """Images per batch of an evaluation."""

    on_nonfinite: Literal["stop", "rollback"] = "stop"
    """A loss that is not finite: end the run, or go back to the last checkpoint at half the lr,
    for which each epoch is saved, whatever that costs."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time, at some cost in speed."""
    save_minutes: float = 10.0
    """Save within an epoch too, whenever the last save is so many minutes old."""
    profile: bool = False
    """Report after each epoch how long the step waited for data."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where figures go beside metrics.csv: tensorboard, wandb or both."""
    quiet: bool = False
    """Print the final table and errors only."""
    run_dir: Path | None = None
    """Folder of the run. Left out: the next free runs/PRESET-N."""
    resume: Path | None = None
    """Go on with the run in this folder, or (auto) with the newest one in runs."""
    limit_batches: int | None = None
    """Stop each epoch after so many batches and evaluate on as many: to try things out."""

    def __post_init__(self) -> None:
        refuse_misfits(self)

    @property
    def evaluated_every(self) -> int:
        """Epochs between two evaluations, whether or not that was given."""
        return self.eval_every or (1 if self.evaluation == "official" else 5)


QUICKSTART = Config(
    dataset="fashion-mnist",
    largest=2000,
    model="resnet8",
    epochs=10,
    lr=0.2,
    schedule="onecycle",
    augment=False,
    select="last",
)

METHODS = {name: Config(**changes) for name, changes in METHOD_PRESETS.items()}  # type: ignore[arg-type]

PRESETS: dict[str, Config] = {"reat": METHODS["reat"], "quickstart": QUICKSTART, **METHODS}
"""reat: the official recipe on CIFAR-10-LT. quickstart: minutes on a CPU, on Fashion-MNIST-LT. The
others are the methods of the field: docs/methods.md."""


SHARES = ("milestones", "second_stage", "attack_from", "awp_from")
"""Numbers of epochs to finish before something changes."""


def in_proportion(recipe: Config, epochs: int) -> Config:
    """Return a recipe for another number of epochs, in which each change comes at its share."""

    def share(epoch: int) -> int:
        return epoch * epochs // recipe.epochs

    return replace(
        recipe,
        epochs=epochs,
        milestones=tuple(max(1, share(epoch)) for epoch in recipe.milestones),
        second_stage=share(recipe.second_stage),
        attack_from=share(recipe.attack_from),
        awp_from=share(recipe.awp_from),
    )


def parse(
    arguments: list[str], default_preset: str, default: Config | None = None
) -> tuple[str, Config]:
    """Read the command line: a preset's name first, then flags.

    Returns the preset's name and the configuration; flags change the preset or, where it is given,
    `default`. A preset of another length keeps the shares of its epochs: see in_proportion.
    Errors: ValueError with one line for an unknown preset or flag and for a value that cannot be.
    """
    preset, rest = default_preset, list(arguments)
    if rest and not rest[0].startswith("-"):
        preset = rest.pop(0)
        if preset not in PRESETS:
            near = difflib.get_close_matches(preset, PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown preset {preset!r}{hint} (presets: {', '.join(PRESETS)})")
    program = f"python -m reat_fast.train [{'|'.join(PRESETS)}]"
    config = parse_flags(Config, rest, program, PRESETS[preset] if default is None else default)
    flags = [given[2:].partition("=")[0] for given in rest if given.startswith("--")]
    named = {name.replace("-", "_") for name in flags}
    if config.imbalance_profile == "as-is" and "largest" not in named:
        config = replace(config, largest=None)  # a preset's, for the set that it is made for
    if default is None:
        shares = in_proportion(PRESETS[preset], config.epochs)
        left: dict[str, Any] = {name: getattr(shares, name) for name in SHARES if name not in named}
        config = replace(config, **left)
    return preset, config

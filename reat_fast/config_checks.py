"""What a configuration may not say: numbers out of range, and fields that do not go together.

Each refusal is one line that names the flag and the cure.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from reat_fast.cli.command import flag
from reat_fast.models import NAMES

if TYPE_CHECKING:
    from reat_fast.config import Config

AT_LEAST = {
    **dict.fromkeys(("largest", "image_size", "width", "epochs", "batch_size", "replays"), 1),
    **dict.fromkeys(("eval_every", "eval_batch_size", "limit_batches"), 1),
    **dict.fromkeys(("steps", "second_stage", "attack_from", "awp_from", "workers"), 0),
}
FINITE = (
    *("lr", "weight_decay", "clip_norm", "gamma", "tail_coefficient", "awp"),
    *("beta", "margin", "margin_tau", "prior_tau", "post_tau"),
)
BELOW_ONE = ("held_out", "momentum", "ema")
AT_MOST_ONE = {
    "eps": ", as images do; 8/255 is usual",
    "step_size": "; 2/255 is usual",
    **dict.fromkeys(("label_smoothing", "warmup", "radius_alpha", "radius_warmup"), ""),
}
LARGEST = 1e30
"""float32 holds it; NaN is not below it."""

Need = tuple[str, bool, str]
"""A field, whether it is fine, and what it must be."""


def refuse_misfits(config: Config) -> None:
    """Raise ValueError for the first field that cannot be."""
    for needs in (_ranges, _combinations):
        for name, fine, need in needs(config):
            if not fine:
                raise ValueError(f"{flag(name)} {getattr(config, name)}: {need}")
    _refuse_for_free_training(config)
    for name, value in vars(config).items():
        if isinstance(value, int) and value >= 2**31 and not name.endswith("seed"):
            raise ValueError(f"{flag(name)} {value}: must be below 2^31")


def _ranges(config: Config) -> Iterator[Need]:
    """Yield what each field must be by itself."""
    for name, least in AT_LEAST.items():
        value = getattr(config, name)
        wanted = f"must be at least {least}" if least else "must be 0 or more"
        yield name, value is None or value >= least, wanted
    for name in FINITE:
        yield (
            name,
            0 <= getattr(config, name) <= LARGEST,
            f"must be a finite number in [0, {LARGEST:.0e}]",
        )
    for name in BELOW_ONE:
        yield name, 0 <= getattr(config, name) < 1, "must lie in [0, 1)"
    for name, usual in AT_MOST_ONE.items():
        yield name, 0 <= getattr(config, name) <= 1, f"must lie in [0, 1]{usual}"
    for name, bits in (("split_seed", 32), ("seed", 63)):
        yield name, 0 <= getattr(config, name) < 2**bits, f"must lie in [0, 2^{bits})"
    yield "imbalance", 0 < config.imbalance <= 1, "must lie in (0, 1]; 0.02 is ratio 50"
    yield (
        "head_scale",
        0 < config.head_scale <= LARGEST,
        f"must be a finite number in (0, {LARGEST:.0e}]",
    )
    yield "save_minutes", config.save_minutes > 0, "must be above 0"
    yield "policy_magnitude", 0 <= config.policy_magnitude <= 30, "must lie in 0..30"
    finished = all(epoch >= 1 for epoch in config.milestones)
    yield "milestones", finished, "must be numbers of epochs, 1 or more"
    known = config.model in NAMES or config.model.startswith("timm/")
    yield "model", known, f"is unknown; give one of {', '.join(NAMES)} or timm/NAME"


def _combinations(config: Config) -> Iterator[Need]:
    """Yield what fields must be beside others."""
    yield (
        "accumulate",
        1 <= config.accumulate <= config.batch_size,
        "must be at least 1, and at most the batch size",
    )
    yield "nesterov", config.momentum > 0 or not config.nesterov, "needs --momentum above 0"
    yield (
        "label_smoothing",
        config.objective in ("bsl", "ce", "trades") or not config.label_smoothing,
        "goes with --objective bsl, ce and trades",
    )
    yield (
        "attack",
        config.attack != "free" or (config.accumulate == 1 and not config.awp),
        "trains on whole batches; give --accumulate 1 and --awp 0",
    )
    yield (
        "attack_from",
        config.attack != "free" or not config.attack_from,
        "goes with an attack that makes examples; --attack free has none, give 0",
    )
    cosine = "needs the cosine classifier; add --head cosine"
    yield "objective", config.objective != "robal" or config.head == "cosine", cosine
    yield "attack_loss", config.attack_loss != "cosine" or config.head == "cosine", cosine
    yield (
        "tail",
        config.objective == "bsl" or config.tail == "none",
        f"goes with --objective bsl; add --tail none to {config.objective}",
    )
    yield (
        "precision",
        config.fused or config.precision != "bf16",
        "the reference of --no-fused computes in float32 or tf32",
    )
    folded = config.fused and config.attack_batchnorm == "eval" and config.attack != "free"
    yield (
        "attack_form",
        config.attack_form in ("auto", "eager") or folded,
        "is one of the folded network, which --no-fused, --attack-batchnorm train and "
        "--attack free do not have; leave it out",
    )
    yield (
        "update_form",
        config.fused or config.update_form in ("auto", "eager"),
        "the reference of --no-fused computes op by op; leave it out",
    )
    yield (
        "graph",
        config.fused or config.graph != "on",
        "the reference of --no-fused has no graph",
    )


def _refuse_for_free_training(config: Config) -> None:
    """Refuse what the attack of a preset may have and free training cannot."""
    if config.attack != "free":
        return
    fitting = {"radius": ("same",), "attack_batchnorm": ("eval",), "attack_loss": ("auto", "ce")}
    needed = [
        f"{flag(name)} {values[0]}"
        for name, values in fitting.items()
        if getattr(config, name) not in values
    ]
    if needed:
        raise ValueError(
            "--attack free: has one radius, and the loss and BatchNorm of training itself; "
            f"add {' '.join(needed)}"
        )

"""Which fields do nothing beside others: what would have to be set for them to act.

They are no faults, since a preset may bring a field that a flag beside it leaves without effect;
but who gives a flag wants to know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from reat_fast.config import PRESETS, Config, in_proportion
from reat_fast.methods.attacks import resolve_attack_loss


@dataclass(frozen=True)
class Need:
    """Fields that act only where a configuration has something, and the flags that give it that."""

    fields: tuple[str, ...]
    flags: str
    met: Callable[[Config], bool]


NEEDS = (
    Need(
        ("beta",),
        "--objective trades, mart or robal",
        lambda config: config.objective in ("trades", "mart", "robal"),
    ),
    Need(
        ("margin", "margin_tau", "prior_tau"),
        "--objective robal and --head cosine",
        lambda config: config.objective == "robal",
    ),
    Need(("post_tau", "head_scale"), "--head cosine", lambda config: config.head == "cosine"),
    Need(("second_stage",), "--objective taet", lambda config: config.objective == "taet"),
    Need(
        ("attack_from",),
        "--attack pgd or fgsm-rs",
        lambda config: config.attack in ("pgd", "fgsm-rs"),
    ),
    Need(("awp_from",), "--awp above 0", lambda config: config.awp > 0),
    Need(
        ("tail_coefficient",),
        "--objective bsl and --tail official or pairwise",
        lambda config: config.tail != "none",
    ),
    Need(("replays",), "--attack free", lambda config: config.attack == "free"),
    Need(
        ("radius_alpha", "radius_warmup"),
        "--radius class",
        lambda config: config.radius == "class",
    ),
    Need(
        ("policy_magnitude",),
        "--policy randaugment",
        lambda config: config.policy == "randaugment",
    ),
    Need(
        ("milestones", "gamma"),
        "--schedule multistep",
        lambda config: config.schedule == "multistep",
    ),
    Need(("warmup",), "--schedule onecycle", lambda config: config.schedule == "onecycle"),
    Need(
        ("imbalance",),
        "--imbalance-profile exp or step",
        lambda config: config.imbalance_profile != "as-is",
    ),
    Need(
        ("eval_every",),
        "--evaluation official, or held-out with --held-out above 0",
        lambda config: (
            config.evaluation == "official"
            or (config.evaluation == "held-out" and config.held_out > 0)
        ),
    ),
)

OF_PGD = Need(
    ("start", "steps", "step_size"), "--attack pgd", lambda config: config.attack == "pgd"
)
"""Not among NEEDS, since a run says what its attack does without where it describes the attack."""


def idle_fields(config: Config, preset: str) -> Iterator[tuple[str, str]]:
    """Yield each field that was changed from its preset and does nothing, and what it goes with."""
    usual = in_proportion(PRESETS.get(preset, Config()), config.epochs)
    for need in NEEDS:
        for name in need.fields:
            if getattr(config, name) != getattr(usual, name) and not need.met(config):
                yield name, need.flags


def acts(config: Config, name: str) -> bool:
    """Return whether a field does something beside the others."""
    return all(need.met(config) for need in (*NEEDS, OF_PGD) if name in need.fields)


def acting(config: Config) -> dict[str, object]:
    """Return the fields that do something beside the others, each with what it comes to.

    What is left open has the value that it stands for, where the configuration alone tells.
    """
    values = {name: value for name, value in vars(config).items() if acts(config, name)}
    come_to = {
        "attack_loss": resolve_attack_loss(config),
        "eval_every": config.evaluated_every,
    }
    return {name: come_to.get(name, value) for name, value in values.items()}

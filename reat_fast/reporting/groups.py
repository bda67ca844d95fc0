"""Groups of runs whose figures may be averaged: one configuration and training set, any seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from reat_fast.cli.radius import fraction_text
from reat_fast.cli.terminal import some
from reat_fast.evaluation.attacks import L2_EPS
from reat_fast.evaluation.trained_on import SPLIT_FIELDS, agree
from reat_fast.methods.idle import acting
from reat_fast.reporting.run_record import RunRecord
from reat_fast.storage.config_file import LOCAL_FIELDS

PROTOCOL = {
    **{"dataset": None, "samples": None, "images_sha256": None},
    **{"eps": None, "step_size": None, "l2_eps": L2_EPS, "restarts": 1},
}
"""What two evaluations must have in common for their figures to be averaged, and what they mean
where they do not say it."""

TRAINED_ON = {
    "train_counts": "training images",
    "class_names": "classes",
    "fingerprint": "training split",
    "images_sha256": "training images_sha256",
}
"""How a report calls what RunRecord.trained_on tells, what people know first."""

IDLE = "–"
"""What stands for a setting that does nothing beside the others of its run."""

ROOM = 40
"""Characters of a label for which a table or a picture has room."""


@dataclass(frozen=True)
class Group:
    """Hold runs of one configuration, which differ in their seed at most.

    differs: the settings in which the groups of a report differ, as text, IDLE where one does
    nothing. short_label: its name in a table. legend: its name in a picture, which has no column
    for the preset.
    """

    letter: str
    differs: dict[str, str]
    runs: list[RunRecord]
    short_label: str = ""
    legend: str = ""

    @property
    def name(self) -> str:
        """What its runs are called but for the seed or number at the end, "" for several names."""
        names = {re.sub(r"-(seed)?\d+$", "", run.name) for run in self.runs}
        return names.pop() if len(names) == 1 else ""

    @property
    def preset(self) -> str:
        """Name the presets of its runs, "" where none is known."""
        return ", ".join(dict.fromkeys(run.preset for run in self.runs if run.preset))

    @property
    def title(self) -> str:
        """Name the group by its letter and, where its runs have one, their name."""
        return f"{self.letter} ({self.name})" if self.name else self.letter

    @property
    def label(self) -> str:
        """Name the group below a table: its title, and how it differs where it does."""
        return self.told_with(self.settings)

    @property
    def settings(self) -> str:
        """Say how the group differs from the others, "" for one without others."""
        told = {name: value for name, value in self.differs.items() if value != IDLE}
        return ", ".join(f"{name}={value}" for name, value in told.items())

    def told_with(self, *texts: str) -> str:
        """Name the group with what is said of it, as far as anything is."""
        said = ", ".join(text for text in texts if text)
        return f"{self.title}: {said}" if said else self.title

    @property
    def evaluated(self) -> list[RunRecord]:
        """Return the runs that have been evaluated."""
        return [run for run in self.runs if run.evaluation is not None]

    def attack_names(self) -> list[str]:
        """Return the attacks that any of the runs was evaluated under, in order."""
        names = (name for run in self.evaluated for name in (run.evaluation or {})["attacks"])
        return list(dict.fromkeys(names))

    def measured(self, attack: str) -> list[RunRecord]:
        """Return the runs that were evaluated under an attack, of each seed the first."""
        found: dict[int, RunRecord] = {}
        for run in self.evaluated:
            if attack in (run.evaluation or {})["attacks"]:
                found.setdefault(run.config.seed, run)
        return list(found.values())

    def values(self, attack: str, part: str) -> list[float | None]:
        """Return a figure of each seed that was evaluated under an attack."""
        evaluations = [run.evaluation for run in self.measured(attack) if run.evaluation]
        return [evaluation["attacks"][attack].get(part) for evaluation in evaluations]

    def repeated(self) -> list[tuple[RunRecord, RunRecord]]:
        """Return each run whose seed an earlier one has, and that one."""
        first: dict[int, RunRecord] = {}
        pairs = [(run, first.setdefault(run.config.seed, run)) for run in self.runs]
        return [(run, earlier) for run, earlier in pairs if run is not earlier]


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Put runs together whose configurations differ in the seed alone, in the order given.

    Settings that do nothing beside the others are no difference, nor is one that was left open
    beside the value that it stands for.
    Runs that were trained on other images, as far as both tell, or evaluated under other conditions
    (PROTOCOL) stand apart.
    """
    settings: list[dict[str, str]] = []
    groups: list[list[RunRecord]] = []
    for run in runs:
        told = _settings(run)
        for known, members in zip(settings, groups, strict=True):
            same_images = all(agree(run.trained_on, member.trained_on) for member in members)
            if told == known and same_images:
                members.append(run)
                break
        else:
            settings.append(told)
            groups.append([run])
    trained = _training_images(groups)
    settings = [told | images for told, images in zip(settings, trained, strict=True)]
    names = list(dict.fromkeys(name for told in settings for name in told))
    differing = [name for name in names if len({told.get(name) for told in settings} - {IDLE}) > 1]
    found = [
        Group(_letter(k), {name: told.get(name, "unset") for name in differing}, members)
        for k, (told, members) in enumerate(zip(settings, groups, strict=True))
    ]
    return _with_short_names(found)


def _with_short_names(groups: Sequence[Group]) -> list[Group]:
    """Name groups where there is little room: all with all their settings, or all with none.

    A setting that is told of one group alone would hide how the others differ from it.
    """

    def fitting(*forms: Callable[[Group], str]) -> list[str]:
        for form in forms:
            texts = [form(group) for group in groups]
            if all(len(text) <= ROOM for text in texts):
                return texts
        return [group.letter for group in groups]

    labels = fitting(lambda group: group.label, lambda group: group.title)
    legends = labels
    if len({group.preset for group in groups}) > 1:
        legends = fitting(
            lambda group: group.told_with(group.preset, group.settings),
            lambda group: group.told_with(group.preset),
            lambda group: group.title,
        )
    return [
        replace(group, short_label=label, legend=legend)
        for group, label, legend in zip(groups, labels, legends, strict=True)
    ]


def _settings(run: RunRecord) -> dict[str, str]:
    acts = acting(run.config)
    values = {
        name: setting_text(name, acts[name]) if name in acts else IDLE
        for name in vars(run.config)
        if name not in ("seed", *LOCAL_FIELDS)
    }
    if run.evaluation:
        protocol = protocol_of(run.evaluation)
        values |= {f"test {name}": setting_text(name, told) for name, told in protocol.items()}
    return values


def _training_images(groups: Sequence[list[RunRecord]]) -> list[dict[str, str]]:
    """Say for each group on what it was trained, where settings do not explain a difference.

    No more is said than tells the groups apart: class sizes before digests.
    """
    told = [
        {name: value for run in members for name, value in run.trained_on.items()}
        for members in groups
    ]
    acts = [acting(members[0].config) for members in groups]
    drawn = [[one.get(name) for name in SPLIT_FIELDS] for one in acts]
    texts = [
        {name: setting_text(name, one[name]) if name in one else "unknown" for name in TRAINED_ON}
        for one in told
    ]
    apart = [
        (texts[one], texts[other])
        for one, other in combinations(range(len(groups)), 2)
        if drawn[one] == drawn[other] and not agree(told[one], told[other])
    ]
    said: list[str] = []
    for name in TRAINED_ON:
        if any(all(one[known] == other[known] for known in said) for one, other in apart):
            said.append(name)
    return [{TRAINED_ON[name]: text[name] for name in said} for text in texts]


def protocol_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the conditions of an evaluation, by the names of PROTOCOL."""
    return {name: evaluation.get(name, default) for name, default in PROTOCOL.items()}


def setting_text(name: str, value: object) -> str:
    """Write the value of a setting for people."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name in ("eps", "step_size", "l2_eps") and isinstance(value, float):
        return fraction_text(value)
    if name in ("images_sha256", "fingerprint"):
        return str(value)[:12]
    if name == "train_counts" and isinstance(value, list):
        return f"{sum(value):,} ({max(value):,} to {min(value):,} a class)"
    if name == "class_names" and isinstance(value, list):
        return some(value)
    if isinstance(value, (tuple, list)):
        return " ".join(map(str, value))
    return str(value)


def _letter(index: int) -> str:
    tens, one = divmod(index, 26)
    return (_letter(tens - 1) if tens else "") + chr(ord("A") + one)

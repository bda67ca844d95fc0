"""What a report says of the settings of a run: those that are not its preset's, and all of them."""

from __future__ import annotations

from dataclasses import asdict, replace

from reat_fast import env
from reat_fast.config import PRESETS, Config, in_proportion
from reat_fast.methods.idle import acting
from reat_fast.reporting import markup
from reat_fast.reporting.groups import setting_text
from reat_fast.reporting.run_record import RunRecord
from reat_fast.reporting.tables import Table
from reat_fast.storage.config_file import LOCAL_FIELDS


def settings_section(run: RunRecord) -> str:
    """Write the settings of a run and the machine that it ran on as HTML."""
    rows = [["setting", "value"]]
    for name, value in asdict(run.config).items():
        if name not in LOCAL_FIELDS:  # paths name people and machines
            rows.append([name, setting_text(name, value)])
    changed, title = changed_settings(run), _title(run)
    if len(changed) > 1:
        shown = markup.table(changed, f"{title}; those without effect are left out.", words=3)
    else:
        shown = markup.paragraph(f"{title}: none that has an effect.")
    machine = markup.preformatted("Machine and versions", env.table(run.environment))
    return f'<div class="cards">{shown}{machine if run.environment else ""}</div>' + markup.table(
        rows, "All settings.", words=2, folded="All settings"
    )


def changed_settings(run: RunRecord) -> Table:
    """Lay out the settings with an effect that are not those of the run's preset.

    What a preset changes after some epochs is taken in proportion to those of the run. A run of no
    known preset is compared with the defaults.
    """
    config, recipe = run.config, _recipe(run)
    usual = in_proportion(recipe, config.epochs)
    if config.imbalance_profile == "as-is":
        usual = replace(usual, largest=None)  # as the command line has it
    acts, would_act = acting(config), acting(usual)
    rows = [["setting", "value", "preset" if run.preset in PRESETS else "default"]]
    if config.epochs != recipe.epochs:
        rows.append(["epochs", str(config.epochs), str(recipe.epochs)])
    for name, value in asdict(config).items():
        known = getattr(usual, name)
        same = value == known or acts.get(name) == would_act.get(name, known)
        if name in acts and name not in LOCAL_FIELDS and not same:
            rows.append([name, setting_text(name, value), setting_text(name, known)])
    return rows


def _recipe(run: RunRecord) -> Config:
    return PRESETS.get(run.preset, Config())


def _title(run: RunRecord) -> str:
    known = run.preset in PRESETS
    compared = f"the preset {run.preset}" if known else "the defaults"
    if run.preset and not known:
        compared += f", since this version has no preset {run.preset}"
    if run.config.epochs != _recipe(run).epochs:
        compared += f", in proportion to {run.config.epochs} epochs"
    return f"Settings that differ from {compared}"

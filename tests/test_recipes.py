"""The recipes that bench/*.txt compare: each line trains, and at the same cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from reat_fast.config import PRESETS
from reat_fast.methods.presets import METHOD_PRESETS
from reat_fast.methods.work import work_of_training
from reat_fast.training.sweep_lines import read_lines

BENCH = Path(__file__).parent.parent / "bench"
RECIPES = sorted(BENCH.glob("recipes*.txt"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_that_are_compared_cost_the_same(file: Path) -> None:
    lines = read_lines(file)
    costs = {line.name: work_of_training(line.config) for line in lines}
    assert len(lines) > 4
    for name, cost in costs.items():
        assert cost == pytest.approx(costs["at-bsl"], rel=0.02), name


def test_every_method_is_measured_on_the_scale_of_a_cpu() -> None:
    lines = {line.name: line for line in read_lines(BENCH / "methods-quickstart.txt")}
    assert lines.keys() >= METHOD_PRESETS.keys()
    same = ("dataset", "largest", "model", "lr", "schedule", "augment", "select")
    for name, line in lines.items():
        config, quickstart = line.config, PRESETS["quickstart"]
        assert line.words[0] == (name if name in METHOD_PRESETS else "at-bsl")
        assert all(getattr(config, field) == getattr(quickstart, field) for field in same), name
    cost = work_of_training(lines["at-bsl"].config)
    for name in ("reat-plus", "fast-start"):
        assert work_of_training(lines[name].config) == pytest.approx(cost, rel=0.02)

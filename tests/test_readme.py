"""The README: its commands parse, its code runs, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from reat_fast import evaluate
from reat_fast.cli.command import parse_flags
from reat_fast.config import PRESETS, parse
from reat_fast.data import DATASETS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.split("#")[0].strip()
    for line in README.splitlines()
    if line.startswith("    ") and not line.strip().startswith("#")
]


def words(module: str) -> list[list[str]]:
    start = f"python -m reat_fast.{module}"
    return [shlex.split(command)[3:] for command in COMMANDS if command.startswith(start)]


def test_every_training_command_parses() -> None:
    commands = words("train")
    assert len(commands) >= 4
    for arguments in commands:
        if arguments == ["--help"]:
            continue
        preset, _ = parse(arguments, "quickstart")
        assert preset in PRESETS


def test_every_evaluation_command_parses() -> None:
    for arguments in words("evaluate"):
        options = parse_flags(evaluate.Options, arguments, "evaluate")
        for name in options.attacks:
            evaluate.Attack.from_name(name, options.eps, options.step_size)


def test_every_make_target_exists() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    named = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
    assert named[:2] == ["train", "test"]
    assert set(named) <= set(targets)


def test_every_module_and_data_set_named_exists() -> None:
    for module in re.findall(r"python -m reat_fast\.(\w+)", README):
        assert (ROOT / "reat_fast" / f"{module}.py").is_file()
    for name in re.findall(r"python -m reat_fast\.data ([\w-]+)", README):
        assert name in DATASETS
    for file in re.findall(r"`(tests/\w+\.py|bench/[\w/]+\.(?:py|json|csv))`", README):
        assert (ROOT / file).is_file()


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    # The network of the example is replaced by a small one; everything else runs as it stands.
    exec(code.replace('"resnet18"', '"resnet8"'), names)
    images, adversarial = names["images"], names["adversarial"]
    assert float((adversarial - images).abs().max()) <= 8 / 255 + 1e-6  # type: ignore[operator]

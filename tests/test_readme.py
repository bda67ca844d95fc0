"""README and docs: their commands parse, their code runs, their files exist."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from reat_fast.cli.command import parse_flags
from reat_fast.config import parse
from reat_fast.data import DATASETS
from reat_fast.evaluation.attacks import Attack
from reat_fast.models import create_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [file.read_text("utf-8") for file in DOCUMENTS]
COMMANDS = [
    line.split("#")[0].strip()
    for line in README.splitlines()
    if line.startswith("    ") and not line.strip().startswith("#")
]


PLACEHOLDERS = {"NAME": "reat", "RUN": "runs/reat-1"}


def command_lines() -> list[tuple[str, tuple[str, ...]]]:
    """Return module and arguments of each command in a line of code or between backticks."""
    found = {}
    for text in TEXTS:
        lines = re.findall(r"^    .*$", text, re.MULTILINE)
        prose = re.sub(r"^    .*$|```[^`]*```", "", text, flags=re.MULTILINE)
        for code in [*lines, *re.findall(r"`([^`]+)`", prose)]:
            match = re.search(r" -m ((?:reat_fast|bench)\.\w+)(.*)", f" {code}", re.DOTALL)
            if match:
                arguments = shlex.split(match[2], comments=True)
                found[match[1], tuple(PLACEHOLDERS.get(word, word) for word in arguments)] = None
    return list(found)


def parsed(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Read a command line by the module's own parser and do nothing more."""
    program = import_module(module)
    if module == "reat_fast.train":
        return parse(arguments, "quickstart")
    if hasattr(program, "Options"):
        return parse_flags(program.Options, arguments, module)
    read, options = argparse.ArgumentParser.parse_args, []

    def stop(self: argparse.ArgumentParser, *given: Any) -> None:
        options.append(read(self, *given))
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(InterruptedError):
        program.main()
    return options[0]


@pytest.mark.parametrize(
    ("module", "arguments"),
    [pytest.param(*found, id=f"{found[0]} {shlex.join(found[1])}") for found in command_lines()],
)
def test_every_command_is_one_that_its_module_takes(
    module: str, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not arguments:  # named in a sentence
        assert callable(import_module(module).main)
        return
    if arguments == ("--help",):
        with pytest.raises(SystemExit):
            parsed(module, list(arguments), monkeypatch)
        return
    options = parsed(module, list(arguments), monkeypatch)
    for name in getattr(options, "attacks", ()):
        Attack.from_name(name, 8 / 255, 2 / 255)


def test_commands_are_found_in_lines_of_code_and_in_tables() -> None:
    modules = [module for module, _ in command_lines()]
    assert modules.count("reat_fast.train") >= 4
    assert {"bench.accuracy", "reat_fast.convert", "reat_fast.export"} <= set(modules)


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


def anchors(text: str) -> set[str]:
    """Return what headings are linked by: small letters, digits and hyphens for spaces."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_links_between_documents_lead_somewhere(file: Path) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", file.read_text("utf-8")):
        target, _, anchor = link.partition("#")
        linked = file.parent / target if target else file
        assert linked.is_file(), link
        assert not anchor or anchor in anchors(linked.read_text("utf-8")), link


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: file.name)
def test_rows_of_a_table_have_as_many_cells_as_its_head(file: Path) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", file.read_text("utf-8"), re.MULTILINE):
        rows = [len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()]
        assert rows == [rows[0]] * len(rows), table
        assert re.fullmatch(r"[|\- ]+", table.splitlines()[1]), table


def test_the_training_loop_of_the_documents_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "sharing.md").read_text("utf-8")
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Step" in code
    )
    names: dict[str, Any] = {}
    exec(code.replace('"resnet18"', '"resnet8"'), names)
    assert capsys.readouterr().out.count("'adv_accuracy'") == 2
    assert names["outcome"]["images_adv"].shape == (8, 3, 32, 32)  # 40 images in batches of 16
    assert names["network"] is names["model"]


def test_the_evaluation_of_the_documents_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    (code,) = (
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "ImageSet" in code
    )
    torch.manual_seed(0)  # of weights that predict no class of the tail
    exec(code, {"model": create_model("resnet8", 10, width=8).eval()})
    tail, *per_class = re.findall(r"[\d.]+", capsys.readouterr().out)
    assert len(per_class) == 10 and float(tail) == 0  # nobody trained it


def test_the_python_example_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    # The network of the example is replaced by a small one; everything else runs as it stands.
    exec(code.replace('"resnet18"', '"resnet8"'), names)
    images, adversarial = names["images"], names["adversarial"]
    assert float((adversarial - images).abs().max()) <= 8 / 255 + 1e-6  # type: ignore[operator]

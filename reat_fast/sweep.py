"""python -m reat_fast.sweep presets.txt --seeds 0 1 2: several runs one after another, one table.

A line of the file is what follows `python -m reat_fast.train`, behind a name where one is wanted:

    reat                                 # comments and empty lines are skipped
    long: reat --epochs 120 --milestones 80 110

Each run is a program of its own in a folder of its own, so one that fails does not end the others,
and the same command goes on where a sweep was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reat_fast import checkpoint
from reat_fast.cli.command import parse_flags, run_command
from reat_fast.config import Config, changes, from_json, parse
from reat_fast.evaluation.attacks import Attack
from reat_fast.evaluation.figures import STANDARD_ATTACKS
from reat_fast.reporting import sweep_table
from reat_fast.storage.whole_files import write_text
from reat_fast.training.run_folder import never_began

OWN_FLAGS = ("--seed", "--run-dir", "--resume", "--help", "-h")
"""Flags that a line may not hold: the sweep sets them."""

STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that was told to stop."""


@dataclass(frozen=True)
class Line:
    """One line of the file: a run to be repeated with every seed."""

    place: str
    name: str
    words: tuple[str, ...]
    config: Config


@dataclass(frozen=True)
class SweepRun:
    """One line with one seed."""

    line: Line
    seed: int
    folder: Path
    data: Path | None = None
    """Where the data is, instead of where its line has it."""

    @property
    def state(self) -> str:
        """Where the run stands: "new", "begun" (it can be resumed) or "finished"."""
        if (self.folder / "evaluation.json").is_file():
            return "finished"
        return "begun" if (self.folder / checkpoint.CHECKPOINT).is_file() else "new"

    @property
    def arguments(self) -> list[str]:
        """What follows `python -m reat_fast.train` to begin the run or to go on with it."""
        preset, *flags = self.line.words
        own = ["--seed", str(self.seed)]
        if self.data is not None:
            own += ["--data", str(self.data)]
        if self.state == "begun":
            return ["--resume", str(self.folder), *flags, *own]
        return [preset, *flags, *own, "--run-dir", str(self.folder)]

    def lacks(self, attacks: Sequence[str]) -> bool:
        """Say whether the evaluation of a finished run leaves out one of these attacks.

        Those that end every run do not count. Errors: ValueError for a damaged evaluation.json.
        """
        file, asked = self.folder / "evaluation.json", set(attacks) - set(STANDARD_ATTACKS)
        try:
            return not asked <= set(json.loads(file.read_text("utf-8"))["attacks"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: damaged or not an evaluation ({error})") from None

    def evaluation(self, attacks: Sequence[str]) -> list[str]:
        """Return what follows `python -m reat_fast.evaluate` to evaluate a finished run."""
        config = self.line.config
        radius = ["--eps", str(config.eps), "--step-size", str(config.step_size)]
        flags = ["--seed", str(self.seed), "--device", config.device, *["--quiet"] * config.quiet]
        return [str(self.folder), "--attacks", *attacks, *radius, *flags]


def read_lines(file: Path) -> list[Line]:
    """Read and check the lines of a file of runs.

    Errors: ValueError naming file and line for anything that reat_fast.train would refuse.
    """
    try:
        text = file.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not a text file") from None
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; write one run a line, as `reat`") from None
    lines: dict[str, Line] = {}
    for number, row in enumerate(text.splitlines(), start=1):
        place = f"{file}:{number}"
        try:
            line = _read_line(place, shlex.split(row, comments=True))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        if line is None:
            continue
        if line.name in lines:
            raise ValueError(
                f"{place}: {lines[line.name].place} is called {line.name} too; put another name "
                f"before it, such as {line.name}-2: {shlex.join(line.words)}"
            )
        lines[line.name] = line
    if not lines:
        raise ValueError(f"{file}: names no run; write one a line, such as: reat --epochs 40")
    return list(lines.values())


def _read_line(place: str, words: list[str]) -> Line | None:
    if not words:
        return None
    name = words.pop(0)[:-1] if words[0].endswith(":") else None
    if not words or words[0].startswith("-"):
        raise ValueError("name a preset first, then flags")
    for word in words:
        if word.partition("=")[0].replace("_", "-") in OWN_FLAGS:
            raise ValueError(f"{word}: leave it out; the sweep sets --seed and --run-dir")
    preset, config = parse(words, "")
    name = preset if name is None else name
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ValueError(f"{name!r} cannot be a name; use letters, digits and . _ + -")
    return Line(place, name, tuple(words), config)


def make_runs(
    lines: Sequence[Line], seeds: Sequence[int], out: Path, data: Path | None = None
) -> list[SweepRun]:
    """Combine lines and seeds, the seeds of a line one after another.

    data: where that of all runs is, instead of where a line has it.
    Errors: ValueError where a run was begun with other flags than its line has now, and for data
    that is not there.
    """
    for line in lines:
        place = data or line.config.data
        if place is not None and not place.exists():
            raise ValueError(f"{line.place}: --data {place}: no such file or folder")
    runs = [
        SweepRun(line, seed, out / f"{line.name}-seed{seed}", data)
        for line in lines
        for seed in seeds
    ]
    for run in runs:
        _refuse_changes(run)
    return runs


def _refuse_changes(run: SweepRun) -> None:
    file = run.folder / "config.json"
    if not file.is_file():
        if run.folder.exists() and not never_began(run.folder):
            raise ValueError(f"{run.folder}: holds no run of this sweep; name another --out")
        return
    if run.state == "new" and any(run.folder.glob("*.safetensors")):
        raise ValueError(f"{run.folder}: has weights but no checkpoint to go on from; move it away")
    begun = from_json(file.read_text("utf-8"), str(file))
    wanted = dataclasses.replace(run.line.config, seed=run.seed)
    for name, old, new in changes(begun, wanted):
        raise ValueError(
            f"{run.line.place}: {name} is {new}, but {run.folder} was begun with {old}; "
            "give the changed line another name"
        )


def run_all(runs: Sequence[SweepRun], out: Path, attacks: Sequence[str]) -> dict[str, int]:
    """Train and evaluate what is not finished, rewriting the table each time; return exit codes.

    Errors: KeyboardInterrupt where the user stopped a run.
    """
    codes: dict[str, int] = {}
    write_tables(runs, out, attacks)
    for number, run in enumerate(runs, start=1):
        head = f"[{number}/{len(runs)}] {run.folder.name}"
        codes[run.folder.name] = 0
        if run.state != "finished":
            if run.state == "new" and run.folder.exists():
                shutil.rmtree(run.folder)  # ended before its first step, so nothing is lost
            code = _run(head, "reat_fast.train", run.arguments)
            codes[run.folder.name] = 1 if code == 0 and run.state != "finished" else code
            write_tables(runs, out, attacks)
        elif not run.lacks(attacks):
            print(f"{head}: finished", flush=True)
        if run.state == "finished" and run.lacks(attacks):
            codes[run.folder.name] = _run(head, "reat_fast.evaluate", run.evaluation(attacks))
            write_tables(runs, out, attacks)
    return codes


def _run(head: str, module: str, arguments: Sequence[str]) -> int:
    print(f"{head}: python -m {module} {shlex.join(arguments)}", flush=True)
    code = run_program([sys.executable, "-m", module, *arguments])
    if code in STOPPED:
        raise KeyboardInterrupt
    return code


def run_program(command: Sequence[str]) -> int:
    """Run a program to its end and return its exit code.

    It stands in a session of its own, and what would end this process is passed on to it once: it
    ends between two steps, with everything saved, and KeyboardInterrupt follows.
    """
    program = subprocess.Popen(command, start_new_session=True)
    passed_on: list[int] = []

    def pass_on(number: int, _: object) -> None:
        passed_on.append(number)
        program.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        code = program.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if passed_on:
        raise KeyboardInterrupt
    return code


def write_tables(runs: Sequence[SweepRun], out: Path, attacks: Sequence[str]) -> str:
    """Write summary.md and summary.csv of what is finished; return the table in Markdown."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.line.name, []).append(run.folder)
    rows = [sweep_table.summarise(name, folders, attacks) for name, folders in groups.items()]
    commands = {run.line.name: shlex.join(run.line.words) for run in runs}
    table = sweep_table.markdown(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "summary.md", sweep_table.document(table, commands))
    write_text(out / "summary.csv", sweep_table.comma_separated(rows, commands))
    return table


@dataclass(frozen=True)
class Options:
    """Run several presets with several seeds, one after another, and sum them up."""

    presets: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Text file with one run a line: [NAME:] PRESET [FLAGS ...]; # begins a comment."""
    seeds: tuple[int, ...] = (0,)
    """Seeds that every line is run with."""
    out: Path | None = None
    """Folder of the runs, NAME-seedN, and of summary.md; unset: sweeps/FILE without its ending."""
    data: Path | None = None
    """Where the data of all runs is; unset: where each line has it."""
    attacks: tuple[str, ...] = ()
    """Attacks to evaluate each finished run under, beside clean and pgd20: pgd100, cw20, aa, ..."""
    dry_run: bool = False
    """Only list what would run."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("--seeds: give each seed once")
        for seed in self.seeds:
            Config(seed=seed)
        for name in self.attacks:
            Attack.from_name(name, 0.0, 0.0)

    @property
    def all_attacks(self) -> list[str]:
        """Those of every run first, each once."""
        return list(dict.fromkeys((*STANDARD_ATTACKS, *self.attacks)))


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, arguments, "python -m reat_fast.sweep")
    out = options.out or Path("sweeps") / options.presets.stem
    runs = make_runs(read_lines(options.presets), options.seeds, out, options.data)
    if options.dry_run:
        for run in runs:
            print(f"{run.state:8}  python -m reat_fast.train {shlex.join(run.arguments)}")
        return 0
    try:
        codes = run_all(runs, out, options.all_attacks)
    except KeyboardInterrupt:
        command = shlex.join(["python", "-m", "reat_fast.sweep", *arguments])
        print(f"stopped; go on with: {command}", file=sys.stderr)
        return 130
    table = write_tables(runs, out, options.all_attacks)
    print(f"\n{table}\n\n{out / 'summary.md'} and summary.csv written")
    failed = [f"{name} (exit code {code})" for name, code in codes.items() if code]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

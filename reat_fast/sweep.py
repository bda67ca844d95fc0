"""python -m reat_fast.sweep presets.txt --seeds 0 1 2: several runs one after another, one table.

A line of the file is what follows `python -m reat_fast.train`, behind a name where one is wanted:

    reat                                 # comments and empty lines are skipped
    long: reat --epochs 120 --milestones 80 110

Each run is a program of its own in a folder of its own, so one that fails does not end the others,
and the same command goes on where a sweep was stopped.
"""

from __future__ import annotations

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

from reat_fast.cli.command import Interrupted, exit_code, parse_flags, run_command
from reat_fast.engine.precision import Precision
from reat_fast.evaluation.attacks import AUTOATTACKS, Attack
from reat_fast.evaluation.figures import STANDARD_ATTACKS
from reat_fast.reporting import sweep_table
from reat_fast.storage.whole_files import refuse_unwritable, write_text
from reat_fast.training.sweep_runs import (
    SweepRun,
    make_runs,
    read_lines,
    refuse_autoattack_on_few_classes,
)

STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""Exit codes of a run that was told to stop."""


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
        elif not run.missing(attacks):
            print(f"{head}: finished", flush=True)
        if run.state == "finished" and (missing := run.missing(attacks)):
            codes[run.folder.name] = _evaluate(head, run, missing)
            write_tables(runs, out, attacks)
    return codes


def _evaluate(head: str, run: SweepRun, missing: Sequence[str]) -> int:
    """Add attacks to a finished run; returns 1 where its figures lack one of them still."""
    code = _run(head, "reat_fast.evaluate", run.evaluation(missing))
    still = run.missing(missing)
    if code == 0 and still:
        print(
            f"{head}: {run.figures} still lacks {' '.join(still)}, for it was measured under other "
            "conditions; move it away and start the sweep again",
            file=sys.stderr,
        )
        return 1
    return code


def _run(head: str, module: str, arguments: Sequence[str]) -> int:
    print(f"{head}: python -m {module} {shlex.join(arguments)}", flush=True)
    code = run_program([sys.executable, "-m", module, *arguments])
    if code in STOPPED:
        raise Interrupted if code in (143, -signal.SIGTERM) else KeyboardInterrupt
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
        raise KeyboardInterrupt if passed_on[0] == signal.SIGINT else Interrupted
    return code


def write_tables(runs: Sequence[SweepRun], out: Path, attacks: Sequence[str]) -> str:
    """Write summary.md and summary.csv of what is finished; return the table in Markdown."""
    groups: dict[str, list[Path]] = {}
    for run in runs:
        files = groups.setdefault(run.line.name, [])
        if run.is_measured:
            files.append(run.figures)
    planned = len(runs) // len(groups)
    rows = [sweep_table.summarise(name, files, planned, attacks) for name, files in groups.items()]
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
    subset: int | None = None
    """Make the table of so many test images, evenly spread over the set; unset: of all."""
    precision: Precision | None = None
    """Arithmetic in which the attacks of the table search; unset: that of each run."""
    dry_run: bool = False
    """Only list what would run."""

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("--seeds: give at least one, and each once")
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise ValueError(f"--seeds {seed}: must lie in [0, 2^63)")
        for name in self.attacks:
            Attack.from_name(name, 0.0, 0.0)
        if self.subset is not None and self.subset < 1:
            raise ValueError(f"--subset {self.subset}: must be at least 1")

    @property
    def all_attacks(self) -> list[str]:
        """Those of every run first, each once."""
        return list(dict.fromkeys((*STANDARD_ATTACKS, *self.attacks)))


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, arguments, "python -m reat_fast.sweep")
    out = options.out or Path("sweeps") / options.presets.stem
    if out.is_file():
        raise ValueError(f"--out {out}: is a file; name a folder")
    runs = make_runs(
        read_lines(options.presets),
        options.seeds,
        out,
        options.data,
        options.subset,
        options.precision,
    )
    if set(AUTOATTACKS) & set(options.attacks):
        refuse_autoattack_on_few_classes(runs)
    if options.dry_run:
        for run in runs:
            print(f"{run.state:8}  python -m reat_fast.train {shlex.join(run.arguments)}")
        return 0
    refuse_unwritable(out / "summary.md")
    try:
        codes = run_all(runs, out, options.all_attacks)
    except KeyboardInterrupt as interrupt:
        command = shlex.join(["python", "-m", "reat_fast.sweep", *arguments])
        print(f"stopped; go on with: {command}", file=sys.stderr)
        return exit_code(interrupt)
    table = write_tables(runs, out, options.all_attacks)
    print(f"\n{table}\n\n{out / 'summary.md'} and summary.csv written")
    failed = [f"{name} (exit code {code})" for name, code in codes.items() if code]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

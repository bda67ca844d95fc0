"""python -m reat_fast.sweep presets.txt --seeds 0 1 2: several runs, one table.

A line of the file is what follows `python -m reat_fast.train`, behind a name where one is wanted:

    reat                                 # comments and empty lines are skipped
    long: reat --epochs 120 --milestones 80 110

Each run is a program of its own in a folder of its own, so one that fails does not end the others,
and the same command goes on where a sweep was stopped.
"""

from __future__ import annotations

import shlex
import sys
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from reat_fast.cli.command import parse_flags, refuse_below, run_command
from reat_fast.engine.precision import Precision
from reat_fast.engine.stopping import exit_code
from reat_fast.evaluation.attacks import AUTOATTACKS, Attack
from reat_fast.evaluation.figures import STANDARD_ATTACKS
from reat_fast.reporting import sweep_table
from reat_fast.storage.weights_file import CheckpointError
from reat_fast.storage.whole_files import refuse_unwritable, write_text
from reat_fast.training.run_folder import FolderLock
from reat_fast.training.sweep_lines import read_lines
from reat_fast.training.sweep_programs import Programs, what_ended
from reat_fast.training.sweep_runs import (
    SweepRun,
    make_runs,
    refuse_autoattack_on_few_classes,
)

Stages = Generator[tuple[str, list[str]], Any, tuple[int, str]]
"""The commands of a run, module and arguments; is sent their exit codes, returns the run's and why,
where no program has said it."""

HELD = "is still being trained by another process"
"""What a sweep says of a folder that it leaves to whoever trains in it."""


def run_all(
    runs: Sequence[SweepRun], out: Path, attacks: Sequence[str], jobs: int = 1
) -> dict[str, int]:
    """Train and evaluate what is not finished, rewriting the table each time; return exit codes.

    jobs: programs at a time; where there are several, what they print goes to OUT/RUN.log.
    Errors: KeyboardInterrupt where the user stopped a run.
    """
    codes: dict[str, int] = {}
    logged: dict[str, int] = {}
    by_name = {run.folder.name: run for run in runs}
    stages = {name: _stages(run, attacks) for name, run in by_name.items()}
    heads = {name: f"[{n}/{len(runs)}] {name}" for n, name in enumerate(by_name, start=1)}
    waiting = deque(by_name)
    write_tables(runs, out, attacks)
    with Programs(min(jobs, max(len(runs), 1))) as programs:
        while waiting or programs.busy:
            if waiting and programs.has_room:
                name, code = waiting.popleft(), None
            else:
                name, code = programs.wait()
                write_tables(runs, out, attacks)
            log = out / f"{name}.log" if jobs > 1 else None
            try:
                module, arguments = stages[name].send(code)
            except StopIteration as end:
                codes[name], why = end.value
                _tell_end(heads[name], codes[name], why, log, logged.get(name))
                continue
            logged[name] = log.stat().st_size if log is not None and log.exists() else 0
            told = "" if log is None else f" >> {shlex.quote(str(log))}"
            print(f"{heads[name]}: python -m {module} {shlex.join(arguments)}{told}", flush=True)
            on_any_gpu = by_name[name].line.config.device in ("auto", "cuda")
            programs.start(name, [sys.executable, "-m", module, *arguments], log, on_any_gpu)
    return {name: codes[name] for name in by_name}  # in their order, whichever ended first


def _tell_end(head: str, code: int, why: str, log: Path | None, logged: int | None) -> None:
    """Say how a run ended, where its own program has not said it on the terminal.

    logged: bytes that the log had before the last of its programs, None where none had to run.
    """
    if why:
        print(f"{head}: {why}", file=sys.stderr, flush=True)
    elif logged is None or (log is not None and code == 0):
        print(f"{head}: finished", flush=True)
    elif log is not None:
        print(f"{head}: exit code {code}: {what_ended(log, logged)}", file=sys.stderr, flush=True)


def _stages(run: SweepRun, attacks: Sequence[str]) -> Stages:
    """Train a run to its end and add the attacks that its figures lack."""
    code = 0
    if run.state != "finished":
        if run.is_held:
            return 2, f"{run.folder} {HELD}; wait for it and start the sweep again"
        code = yield "reat_fast.train", run.arguments
        code = 1 if code == 0 and run.state != "finished" else code
    if run.state == "finished" and (missing := run.missing(attacks)):
        code = yield "reat_fast.evaluate", run.evaluation(missing)
        still = run.missing(missing)
        if code == 0 and still:
            return 1, (
                f"{run.figures} still lacks {' '.join(still)}, for it was measured under other "
                "conditions; move it away and start the sweep again"
            )
    return code, ""


def list_all(runs: Sequence[SweepRun], attacks: Sequence[str]) -> None:
    """Print where each run stands, and what run_all would do with it.

    How a run that is not finished will have been tested is left out of the command that adds
    attacks: evaluate takes the same from the run.
    """
    for run in runs:
        state, missing = run.state, run.missing(attacks)
        if state == "finished":
            print(f"{state}  {run.folder} is kept")
        elif run.is_held:
            print(f"held      {run.folder} {HELD}")
            continue
        else:
            print(f"{state:8}  python -m reat_fast.train {shlex.join(run.arguments)}")
        if missing:
            print(f"{'':8}  python -m reat_fast.evaluate {shlex.join(run.evaluation(missing))}")


def write_tables(runs: Sequence[SweepRun], out: Path, attacks: Sequence[str]) -> str:
    """Write summary.md and summary.csv of what is finished; return the table in Markdown."""
    groups: dict[str, list[SweepRun]] = {}
    for run in runs:
        groups.setdefault(run.line.name, []).append(run)
    rows = [
        sweep_table.summarise(
            sweep_table.Planned(name, tuple(run.seed for run in group), group[0].words),
            [run.figures for run in group if run.is_measured],
            attacks,
        )
        for name, group in groups.items()
    ]
    table = sweep_table.markdown(rows)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "summary.md", sweep_table.document(rows))
    write_text(out / "summary.csv", sweep_table.comma_separated(rows))
    return table


@dataclass(frozen=True)
class Options:
    """Run several presets with several seeds, one or some at a time, and sum them up."""

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
    """Make the table of so many test images, each class by its share; unset: of all."""
    precision: Precision | None = None
    """Arithmetic in which the attacks of the table search; unset: that of each run."""
    jobs: int = 1
    """Runs at a time. Several GPUs are shared out among them, the cores of a CPU too."""
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
        refuse_below(1, self, "subset", "jobs")

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
        list_all(runs, options.all_attacks)
        return 0
    lock = _hold(out)
    try:
        refuse_unwritable(out / "summary.md")
        codes = run_all(runs, out, options.all_attacks, options.jobs)
        return _sum_up(runs, out, options.all_attacks, codes)
    except KeyboardInterrupt as interrupt:
        command = shlex.join(["python", "-m", "reat_fast.sweep", *arguments])
        print(f"stopped; go on with: {command}", file=sys.stderr)
        return exit_code(interrupt)
    finally:
        lock.release()


def _hold(out: Path) -> FolderLock:
    """Make the folder of a sweep and take it for this one alone: its tables and logs are there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return FolderLock(out)
    except CheckpointError:
        raise ValueError(
            f"--out {out}: another sweep is at work there; wait for it, or name another folder"
        ) from None
    except OSError as error:
        raise OSError(
            f"--out {out}: cannot be made ({error.strerror}); name another folder"
        ) from error


def _sum_up(
    runs: Sequence[SweepRun], out: Path, attacks: Sequence[str], codes: Mapping[str, int]
) -> int:
    """Print the table, and which runs failed; returns the exit code of the sweep."""
    table = write_tables(runs, out, attacks)
    print(f"\n{table}\n\n{out / 'summary.md'} and summary.csv written")
    failed = [f"{name} (exit code {code})" for name, code in codes.items() if code]
    if failed:
        print(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

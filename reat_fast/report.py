"""python -m reat_fast.report RUN [RUN ...]: an HTML page, pictures as PNG, a table for papers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from reat_fast.checkpoint import WEIGHTS
from reat_fast.cli.command import choose_device, parse_flags, refuse_below, run_command
from reat_fast.cli.terminal import one_line, some
from reat_fast.engine.memory import keep_freed_memory
from reat_fast.engine.stopping import ended_by_sigterm
from reat_fast.evaluation.saved import EVALUATION
from reat_fast.reporting.compared import compared_report
from reat_fast.reporting.pages import Report, run_report
from reat_fast.reporting.probe import Probe, probe_run
from reat_fast.reporting.run_record import RunRecord, read_run
from reat_fast.reporting.style import write_png
from reat_fast.reporting.tables import markdown
from reat_fast.sources.formats import DataError
from reat_fast.storage.whole_files import alone, refuse_unwritable, write_text


@dataclass(frozen=True)
class Options:
    """Show what runs have learned: a page, its pictures, and a table for papers."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Folders of runs. Several are put side by side, with mean and spread over seeds."""
    out: Path | None = None
    """The .html file to write; pictures and table.md go into a folder of that name beside it.
    Unset: RUN/report.html, or report.html here for several runs."""
    model: bool = True
    """Attack the model of a single run to show confusion, images and features."""
    images: int = 500
    """Test images for that, evenly spread over the set."""
    data: Path | None = None
    """Where the data is; unset: where the run found it."""
    skip_bad: bool = False
    """Leave out images that cannot be decoded, as a run with this flag does."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("RUN: name the folder of at least one run")
        refuse_below(1, self, "images")
        if len(self.runs) > 1 and self.data is not None:
            raise ValueError(f"--data {self.data}: of several runs none is attacked; leave it out")
        if self.out is not None and self.out.suffix != ".html":
            raise ValueError(f"--out {self.out}: must end in .html")


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit code."""
    options = parse_flags(Options, arguments, "python -m reat_fast.report")
    runs = [read_run(folder) for folder in options.runs]
    usual = runs[0].folder / "report.html" if len(runs) == 1 else Path("report.html")
    out = options.out or usual
    if options.data is not None and not options.data.exists():
        raise ValueError(f"--data {options.data}: no such file or folder; name where the data is")
    with ended_by_sigterm(), alone(out):
        refuse_unwritable(out)
        if out.with_suffix("").is_file():
            folder = out.with_suffix("")
            raise ValueError(f"--out {out}: {folder} is a file; pictures go into a folder")
        report = _report(runs, options)
        folder = write_report(report, out)
    print(f"{out} written; {len(report.pictures)} pictures and table.md in {folder}")
    for line in (*_left_out(runs), *report.remarks):
        print(one_line(line))
    return 0


def _report(runs: Sequence[RunRecord], options: Options) -> Report:
    if len(runs) > 1:
        return compared_report(runs)
    probe, missing = _probe(runs[0], options)
    report = run_report(runs[0], probe, missing)
    if missing and options.model:
        report = dataclasses.replace(report, remarks=(missing,))
    return report


def _left_out(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Name the evaluations of runs that a report does not show."""
    others = [str(file) for run in runs for file in sorted(run.folder.glob("evaluation-*.json"))]
    if others:
        yield (
            f"figures are those of {EVALUATION}; other evaluations are not shown: {some(others)}"
        )


def _probe(run: RunRecord, options: Options) -> tuple[Probe | None, str]:
    """Attack the model of a run, or say in one line why that cannot be.

    Errors: ValueError for data that the user named and that cannot be read.
    """
    if not options.model:
        return None, "Left out with --no-model: confusion, images and features under attack."
    if not any((run.folder / name).is_file() for name in WEIGHTS):
        return None, (
            f"No weights in the folder ({', '.join(WEIGHTS)}), so confusion, images and features "
            "are missing; training saves them after an epoch, as often as it can afford."
        )
    device = choose_device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        return probe_run(run, options.images, options.data, device, options.skip_bad), ""
    except DataError as error:
        told = str(error).removeprefix("--data ")
        if options.data is not None:
            place = "" if told.startswith(str(options.data)) else f"{options.data}: "
            raise ValueError(f"--data {place}{told}") from None
        return None, (
            f"Confusion, images and features are missing, for the run's data cannot be read "
            f"({told}); write the report again with --data PATH, where the data is now."
        )


def write_report(report: Report, out: Path) -> Path:
    """Write the page to `out`, pictures and table.md beside it; returns the folder of those."""
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    for picture in report.pictures:
        write_png(folder / f"{picture.name}.png", picture.figure)
    write_text(folder / "table.md", f"{markdown(report.table)}\n{report.table_note}\n")
    write_text(out, report.page)
    return folder


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

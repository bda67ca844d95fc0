"""The figures of a run for TensorBoard and Weights & Biases, beside metrics.csv.

Scalars have the same names in both: train/loss, eval/pgd10_tail, test/pgd20, time/seconds. The step
is the epoch; the figures of the test set stand one step after the last epoch. Paths of the machine
are not passed on.
"""

from __future__ import annotations

import json
import os
import shlex
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from reat_fast.cli.extras import import_extra
from reat_fast.storage.config_file import LOCAL_FIELDS
from reat_fast.storage.whole_files import write_text

LogName = Literal["tensorboard", "wandb"]
Scalars = dict[str, float]
Row = Mapping[str, Any]
Bars = dict[str, list[float]]
"""Values per class [C] by name."""

WANDB_ID = "wandb-id.txt"
"""File of the run folder with the id under which a resumed run goes on."""


class Sink(Protocol):
    """A place that figures are written to."""

    where: str
    """What to tell the user: how to see the figures."""

    def write(self, step: int, scalars: Scalars, bars: Bars) -> None:
        """Write the figures of one step; steps never go back."""

    def close(self) -> None:
        """Leave everything written."""


def check_logs(names: Sequence[str]) -> None:
    """Raise ValueError with the cure where a log is unknown or its package is missing."""
    for name in names:
        if name not in get_args(LogName):
            raise ValueError(f"--log {name}: choose from {', '.join(get_args(LogName))}")
        _package(name)


class MetricLog:
    """Write a run's figures to the logs that --log names; with none, do nothing.

    config: the fields of the run's configuration. history: the rows of metrics.csv and timing.csv
    behind a resumed run; they are written again, so that a log opened on the way is whole, and
    nothing is there twice. attack: the one behind the columns eval_robust*. The run is shown under
    the name of its folder.
    Errors: ValueError with the cure, as check_logs, and where W&B will not start.
    """

    def __init__(
        self,
        names: Sequence[str],
        run_dir: Path,
        config: Mapping[str, Any],
        preset: str,
        *,
        history: Iterable[tuple[Row, Row]] = (),
        attack: str = "robust",
    ) -> None:
        check_logs(names)
        told = {name: value for name, value in config.items() if name not in LOCAL_FIELDS}
        opened: dict[str, Callable[[Path, Row], Sink]]
        opened = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
        self._attack, self._step = attack, 0
        self._sinks = [
            opened[name](run_dir, {"preset": preset, **told}) for name in dict.fromkeys(names)
        ]
        for metrics, timing in history:
            self.epoch(metrics, timing)

    @property
    def where(self) -> list[str]:
        """How to see the figures, one line a log."""
        return [sink.where for sink in self._sinks]

    def epoch(self, metrics: Row, timing: Row) -> None:
        """Write a row of metrics.csv and one of timing.csv; empty fields are left out."""
        named = {_scalar_name(name, self._attack): value for name, value in metrics.items()}
        named |= {f"time/{name}": value for name, value in timing.items()}
        for name in ("train/epoch", "time/epoch", "train/ae_counts"):
            named.pop(name, None)
        scalars = {name: float(value) for name, value in named.items() if value not in ("", None)}
        counts = [float(word) for word in str(metrics.get("ae_counts", "")).split()]
        self._write(int(metrics["epoch"]), scalars, {"train/ae_counts": counts} if counts else {})

    def result(self, evaluation: Row) -> None:
        """Write the figures of evaluation.json: accuracies overall, of parts and per class."""
        scalars: Scalars = {}
        bars: Bars = {}
        for attack, figures in evaluation["attacks"].items():
            for part, value in figures.items():
                name = f"test/{attack}" if part == "overall" else f"test/{attack}_{part}"
                if part == "per_class":
                    bars[name] = [float(share or 0.0) for share in value]
                elif isinstance(value, (int, float)):
                    scalars[name] = float(value)
        self._write(self._step + 1, scalars, bars)

    def _write(self, step: int, scalars: Scalars, bars: Bars) -> None:
        self._step = step
        for sink in self._sinks:
            sink.write(step, scalars, bars)

    def close(self) -> None:
        """Leave everything written."""
        for sink in self._sinks:
            sink.close()


def _package(name: str) -> Any:
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    return import_extra(module, f"--log {name}", "log")


def _scalar_name(column: str, attack: str) -> str:
    """Name a column of metrics.csv as the field does: eval_robust_tail is eval/pgd10_tail."""
    if column.startswith("eval_"):
        return f"eval/{column.removeprefix('eval_').replace('robust', attack, 1)}"
    return f"train/{column}"


class TensorBoard:
    """Write event files into the run folder, whose name TensorBoard shows."""

    def __init__(self, run_dir: Path, config: Row) -> None:
        # A resumed run writes its history again: TensorBoard then hides what older files hold.
        purge_step = 0 if any(run_dir.glob("events.out.tfevents.*")) else None
        self._writer = _package("tensorboard").SummaryWriter(str(run_dir), purge_step=purge_step)
        self.where = f"TensorBoard: tensorboard --logdir {shlex.quote(str(run_dir.parent))}"
        text = json.dumps(dict(config), indent=4, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.split("\n")), 0)

    def write(self, step: int, scalars: Scalars, bars: Bars) -> None:
        """Write scalars, and values per class as a histogram with one bar a class."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        for name, values in bars.items():
            self._writer.add_histogram_raw(
                name,
                min=-0.5,
                max=len(values) - 0.5,
                num=sum(values),
                sum=sum(c * value for c, value in enumerate(values)),
                sum_squares=sum(c * c * value for c, value in enumerate(values)),
                bucket_limits=[c + 0.5 for c in range(len(values))],
                bucket_counts=values,
                global_step=step,
            )
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WeightsAndBiases:
    """Write to one W&B run, found again by its id; WANDB_MODE=offline keeps it on the machine.

    A run that goes on at the server is not told again what the server has; one that goes on offline
    is whole in its newest folder. Neither code nor what the program prints is sent.
    """

    MOST_BARS = 512
    """Bars that W&B takes in a histogram."""

    def __init__(self, run_dir: Path, config: Row) -> None:
        self._wandb = _package("wandb")
        file = run_dir / WANDB_ID
        known = file.is_file()
        if not known:
            write_text(file, uuid.uuid4().hex[:8] + "\n")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", "reat_fast"),
                id=file.read_text("utf-8").strip(),
                name=run_dir.resolve().name,
                resume="allow" if known else None,
                dir=str(run_dir),
                config=json.loads(json.dumps(dict(config), default=str)),
                settings=self._wandb.Settings(
                    console="off", disable_code=True, disable_git=True, silent=True
                ),
            )
        except self._wandb.errors.Error as error:
            raise ValueError(
                f"--log wandb: {' '.join(str(error).split())}; log in with `wandb login`, or keep "
                "the figures on this machine with WANDB_MODE=offline"
            ) from None
        self._first_step = self._run.step
        sync = f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        self.where = f"W&B: {sync if self._run.offline else self._run.url}"

    def write(self, step: int, scalars: Scalars, bars: Bars) -> None:
        """Write scalars, and values per class as a histogram with one bar a class."""
        if step < self._first_step:
            return
        histograms = {
            name: self._wandb.Histogram(
                np_histogram=(values, [c - 0.5 for c in range(len(values) + 1)])
            )
            for name, values in bars.items()
            if len(values) <= self.MOST_BARS
        }
        self._run.log({**scalars, **histograms}, step=step)

    def close(self) -> None:
        """Send or store what is left."""
        self._run.finish()

"""The runs of a sweep: each line of its file with every seed, and where each run stands."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reat_fast import checkpoint
from reat_fast.cli.command import flag
from reat_fast.data import DATASETS, DataError, find_dataset, load_run_data
from reat_fast.engine.precision import Precision
from reat_fast.evaluation.attacks import LINF_STEP
from reat_fast.evaluation.figures import STANDARD_ATTACKS
from reat_fast.evaluation.guards import refuse_few_classes
from reat_fast.evaluation.saved import EVALUATION, of_these_weights, refuse_other_types
from reat_fast.evaluation.trained_on import was_trained_on
from reat_fast.storage.config_file import changes, from_json
from reat_fast.storage.json_object import read_object
from reat_fast.storage.weights_file import CheckpointError
from reat_fast.training.run_folder import FolderLock, epochs_done, never_began, train_counts
from reat_fast.training.sweep_lines import Line


@dataclass(frozen=True)
class SweepRun:
    """One line with one seed."""

    line: Line
    seed: int
    folder: Path
    data: Path | None = None
    """Where the data is, instead of where its line has it."""
    subset: int | None = None
    """Test images that figures are of; unset: all."""
    precision: Precision | None = None
    """Arithmetic of the attacks that figures are of; unset: that of a run's own evaluation."""

    @property
    def figures(self) -> Path:
        """The evaluation that the table is made of: the run's own, or one under other conditions.

        All figures of a table are under one set of conditions, clean accuracy included.
        """
        subset = "" if self.subset is None else f"-subset{self.subset}"
        precision = "" if self.precision is None else f"-{self.precision}"
        return self.folder / f"evaluation{subset}{precision}.json"

    @property
    def state(self) -> str:
        """Where the run stands: "new", "begun" (it can be resumed) or "finished".

        Errors: ValueError for a damaged evaluation.
        """
        has_checkpoint = (self.folder / checkpoint.CHECKPOINT).is_file()
        if self._was_tested and (
            not has_checkpoint
            or (epochs_done(self.folder) == self.line.config.epochs and self._tested_as_now)
        ):
            return "finished"
        return "begun" if has_checkpoint else "new"

    @property
    def _was_tested(self) -> bool:
        """Whether the run ended with a test of the weights that it has now.

        Such an evaluation tells their epoch; one that was made of a run which still goes on does
        not.
        """
        evaluation = _read(self.folder / EVALUATION)
        return "weights_epoch" in evaluation and of_these_weights(evaluation, self.folder)

    @property
    def _tested_as_now(self) -> bool:
        """Whether that test had the steps of today, not those of the training as it once had.

        Resumed, such a run is tested again.
        """
        evaluation = _read(self.folder / EVALUATION)
        eps = evaluation.get("eps", self.line.config.eps)
        return math.isclose(evaluation.get("step_size", LINF_STEP * eps), LINF_STEP * eps)

    @property
    def is_held(self) -> bool:
        """Whether a living process trains in the folder, such as one by hand."""
        try:
            FolderLock(self.folder).release()
        except FileNotFoundError:
            return False
        except CheckpointError:
            return True
        return False

    @property
    def is_measured(self) -> bool:
        """Whether there are figures of the finished run for the table."""
        if self.state != "finished":
            return False
        evaluation = _read(self.figures)
        return bool(evaluation) and of_these_weights(evaluation, self.folder)

    @property
    def words(self) -> list[str]:
        """What follows `python -m reat_fast.train` to make such a run in any folder.

        Data that neither sweep nor line names is where the run, if begun, had it.
        """
        place = self.data
        if place is None and self.line.config.data is None:
            with contextlib.suppress(OSError, ValueError):
                place = from_json((self.folder / "config.json").read_text("utf-8")).data
        data = [] if place is None else ["--data", str(place)]
        return [*self.line.words, "--seed", str(self.seed), *data]

    @property
    def arguments(self) -> list[str]:
        """What follows `python -m reat_fast.train` to begin the run or to go on with it."""
        if self.state == "begun":
            return ["--resume", str(self.folder), *self.words[1:]]
        return [*self.words, "--run-dir", str(self.folder)]

    def missing(self, attacks: Sequence[str]) -> list[str]:
        """Return those of these attacks that the evaluation of a finished run leaves out.

        Those that end every run do not count there. Errors: ValueError for a damaged file.
        """
        there = set(_read(self.figures)["attacks"]) if self.is_measured else set()
        if self.figures.name == EVALUATION:
            there.update(STANDARD_ATTACKS)
        return [attack for attack in attacks if attack not in there]

    def evaluation(self, attacks: Sequence[str]) -> list[str]:
        """Return what follows `python -m reat_fast.evaluate` to add attacks to a run at its end.

        Whatever is not asked for is as in the figures that are there, so that these stay; those of
        a run that is not finished will not.
        """
        config, subset = self.line.config, self.subset
        if subset is None and config.limit_batches is not None:
            subset = config.limit_batches * config.batch_size  # as Run.limited has it
        flags = ["--eps", str(config.eps), "--seed", str(self.seed), "--device", config.device]
        flags += ["--quiet"] * config.quiet
        if subset is not None:
            flags += ["--subset", str(subset)]
        there = {}
        if self.state == "finished":
            there = _read(self.figures) or _read(self.folder / EVALUATION)
        precision = self.precision or there.get("precision")
        if precision is not None:
            flags += ["--precision", precision]
        for name in ("step_size", "l2_eps", "restarts"):
            if name in there:
                flags += [flag(name), str(there[name])]
        if self.figures.name != EVALUATION:
            flags += ["--out", str(self.figures)]
        return [str(self.folder), "--attacks", *attacks, *flags]


def _read(file: Path) -> dict[str, Any]:
    """Read an evaluation, {} where there is none. Errors: ValueError for a damaged one."""
    try:
        evaluation = read_object(file)
        refuse_other_types(evaluation)
        return {**evaluation, "attacks": dict(evaluation["attacks"])}
    except FileNotFoundError:
        return {}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: damaged or not an evaluation ({error})") from None


def make_runs(
    lines: Sequence[Line],
    seeds: Sequence[int],
    out: Path,
    data: Path | None = None,
    subset: int | None = None,
    precision: Precision | None = None,
) -> list[SweepRun]:
    """Combine lines and seeds, the seeds of a line one after another.

    data, subset, precision: of all runs, see SweepRun.
    Errors: ValueError where a run was begun with other flags or other training images than its line
    has now, and for data that is not there.
    """
    runs = [
        SweepRun(line, seed, out / f"{line.name}-seed{seed}", data, subset, precision)
        for line in lines
        for seed in seeds
    ]
    known: dict[tuple[object, ...], dict[str, str]] = {}
    for run in runs:
        _refuse_changes(run)
        _refuse_missing_data(run)
        _refuse_other_data(run, known)
    return runs


def refuse_autoattack_on_few_classes(runs: Sequence[SweepRun]) -> None:
    """Raise ValueError naming a line on whose data AutoAttack is not defined, before it is trained.

    Data that a run which was begun tells of is not read, and no other more than once.
    """
    known: dict[tuple[object, ...], int] = {}
    for run in runs:
        config, place = run.line.config, run.data or run.line.config.data
        data = config.dataset, place, config.image_size
        counts = train_counts(run.folder)
        if counts is not None:
            known[data] = len(counts)
        elif data not in known:
            fixed = DATASETS[config.dataset]
            known[data] = len(fixed) or load_run_data(config, path=place).num_classes
        try:
            refuse_few_classes(known[data])
        except ValueError as error:
            raise ValueError(f"{run.line.place}: {error}") from None


def _refuse_missing_data(run: SweepRun) -> None:
    config = run.line.config
    place = run.data or config.data
    if place is None and run.state != "new":
        return  # it goes on with the data that it was begun with
    try:
        find_dataset(config.dataset, place, config.image_size)
    except DataError as error:
        raise ValueError(f"{run.line.place}: {error}") from None


def _refuse_other_data(run: SweepRun, known: dict[tuple[object, ...], dict[str, str]]) -> None:
    place = run.data or run.line.config.data
    if place is None or run.state == "new":
        return
    file = run.folder / "config.json"
    begun = from_json(file.read_text("utf-8"), str(file))
    try:
        same = was_trained_on(run.folder, begun, place, known)
    except DataError as error:
        raise ValueError(f"{run.line.place}: {error}") from None
    if not same:
        raise ValueError(
            f"{run.line.place}: --data {place}: its training images are not those that {run.folder}"
            " was begun with; name another --out, or the data that it had"
        )


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
    if run.state == "new" and not never_began(run.folder):
        raise ValueError(f"{run.folder}: holds files but no checkpoint to go on from; move it away")

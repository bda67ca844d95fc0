"""Logs: TensorBoard and W&B show the figures of metrics.csv, once each, and nothing private."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from reat_fast.training.logs import WANDB_ID, MetricLog, check_logs

CONFIG = {"lr": 0.1, "milestones": (60, 75), "data": Path("/home/someone/cifar"), "device": "cpu"}
RESULT = {
    "attacks": {
        "clean": {"overall": 70.0, "tail": None, "per_class": [90.0, None, 50.0]},
        "pgd20": {"overall": 30.0, "tail": 10.0, "per_class": [50.0, None, 10.0]},
    }
}


def row(epoch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The rows that metrics.csv and timing.csv have for an epoch."""
    evaluated = epoch % 2 == 0
    metrics = {"epoch": epoch, "lr": 0.1, "loss": 1 / epoch, "adv_accuracy": 25.0}
    metrics |= {"eval_clean": 60.0, "eval_robust": 20.0} if evaluated else {"eval_clean": ""}
    metrics |= {"eval_robust_tail": 5.0 if evaluated else "", "ae_counts": f"{epoch} 2 3"}
    return metrics, {"epoch": epoch, "seconds": 1.5, "images_per_second": 100.0}


class FakeRun:
    """Stands for a W&B run: notes what is logged."""

    offline, url, dir = False, "https://wandb.example/run", "/run/wandb/x/files"

    def __init__(self, step: int) -> None:
        self.step = step
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


class FakeWandb(types.ModuleType):
    """Stands for wandb: step is the first that its server does not have yet."""

    __file__ = "wandb/__init__.py"

    def __init__(self, step: int = 0, error: str | None = None) -> None:
        super().__init__("wandb")
        self.run, self.error = FakeRun(step), error
        self.options: dict[str, Any] = {}
        self.errors = types.SimpleNamespace(Error=RuntimeError)

    def init(self, **options: Any) -> FakeRun:
        self.options = options
        if self.error is not None:
            raise RuntimeError(self.error)
        return self.run

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802
        return settings

    def Histogram(self, np_histogram: Any) -> Any:  # noqa: N802
        return np_histogram


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_without_a_log_nothing_is_written(tmp_path: Path) -> None:
    log = MetricLog([], tmp_path, CONFIG, "reat")
    log.epoch(*row(1))
    log.result(RESULT)
    log.close()
    assert log.where == [] and list(tmp_path.iterdir()) == []


def test_figures_have_the_names_of_the_field(tmp_path: Path, wandb: FakeWandb) -> None:
    log = MetricLog(["wandb"], tmp_path, CONFIG, "reat", attack="pgd10")
    log.epoch(*row(1))
    log.epoch(*row(2))
    log.result(RESULT)
    log.close()
    (first, one), (second, two), (third, test) = wandb.run.logged
    assert (first, second, third) == (1, 2, 3)
    always = {"train/lr", "train/loss", "train/adv_accuracy", "train/ae_counts"}
    always |= {"time/seconds", "time/images_per_second"}
    assert set(one) == always
    assert set(two) - always == {"eval/clean", "eval/pgd10", "eval/pgd10_tail"}
    assert two["train/loss"] == 0.5 and two["eval/pgd10_tail"] == 5.0
    assert two["train/ae_counts"] == ([2, 2, 3], [-0.5, 0.5, 1.5, 2.5])
    assert {name for name in test if "per_class" not in name} == {
        "test/clean",
        "test/pgd20",
        "test/pgd20_tail",
    }
    assert test["test/pgd20_per_class"][0] == [50.0, 0.0, 10.0]
    assert wandb.run.finished


def test_wandb_is_told_the_configuration_but_no_path_code_or_console(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    (tmp_path / "run-7").mkdir()
    log = MetricLog(["wandb"], tmp_path / "run-7", CONFIG, "reat")
    assert wandb.options["config"] == {"preset": "reat", "lr": 0.1, "milestones": [60, 75]}
    assert wandb.options["name"] == "run-7" and wandb.options["resume"] is None
    private = {"console": "off", "disable_code": True, "disable_git": True}
    assert private.items() <= wandb.options["settings"].items()
    assert log.where == ["W&B: https://wandb.example/run"]


def test_a_resumed_run_goes_on_under_its_id_and_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", first)
    MetricLog(["wandb"], tmp_path, CONFIG, "reat").epoch(*row(1))
    second = FakeWandb(step=2)
    monkeypatch.setitem(sys.modules, "wandb", second)
    log = MetricLog(["wandb"], tmp_path, CONFIG, "reat", history=[row(1)])
    log.epoch(*row(2))
    assert second.options["id"] == first.options["id"] == (tmp_path / WANDB_ID).read_text().strip()
    assert second.options["resume"] == "allow"
    assert [step for step, _ in second.run.logged] == [2]


def test_more_classes_than_wandb_has_bars_are_left_out(tmp_path: Path, wandb: FakeWandb) -> None:
    metrics, timing = row(1)
    log = MetricLog(["wandb"], tmp_path, CONFIG, "reat")
    log.epoch({**metrics, "ae_counts": "1 " * 1000}, timing)
    (_, logged) = wandb.run.logged[0]
    assert "train/ae_counts" not in logged and "train/loss" in logged


def test_a_wandb_that_will_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(error="api_key not\nconfigured"))
    with pytest.raises(ValueError, match=r"^--log wandb: api_key not configured; log in with"):
        MetricLog(["wandb"], tmp_path, CONFIG, "reat")


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named_with_its_cure(
    name: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf'--log {name} .*pip install "reat-fast\[log\]"'):
        check_logs([name])


def test_a_folder_called_wandb_is_not_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # put back at the end
    del sys.modules["wandb"]
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ValueError, match="pip install"):
        check_logs(["wandb"])


def test_an_unknown_log_is_refused() -> None:
    with pytest.raises(ValueError, match="--log csv: choose from tensorboard, wandb"):
        check_logs(["csv"])


def read_tensorboard(run_dir: Path) -> Any:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    events = accumulator.EventAccumulator(str(run_dir), size_guidance={"histograms": 0})
    events.Reload()
    return events


def test_a_folder_with_a_space_is_shown_as_a_shell_takes_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    log = MetricLog(["tensorboard"], tmp_path / "my runs" / "run", CONFIG, "reat")
    log.close()
    assert log.where == [f"TensorBoard: tensorboard --logdir '{tmp_path / 'my runs'}'"]


def test_tensorboard_shows_every_figure_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    log = MetricLog(["tensorboard"], tmp_path, CONFIG, "reat", attack="pgd10")
    for epoch in (1, 2, 3):  # of which the checkpoint of epoch 3 was never written
        log.epoch(*row(epoch))
    log.close()
    history = [row(1), row(2)]
    log = MetricLog(["tensorboard"], tmp_path, CONFIG, "reat", history=history, attack="pgd10")
    log.epoch(*row(3))
    log.epoch(*row(4))
    log.result(RESULT)
    log.close()
    assert log.where == [f"TensorBoard: tensorboard --logdir {tmp_path.parent}"]

    events = read_tensorboard(tmp_path)
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(epoch, pytest.approx(1 / epoch, rel=1e-6)) for epoch in (1, 2, 3, 4)]
    assert [event.step for event in events.Scalars("eval/pgd10_tail")] == [2, 4]
    assert [(event.step, event.value) for event in events.Scalars("test/pgd20")] == [(5, 30.0)]
    counts, *_ = events.Histograms("train/ae_counts")
    assert list(counts.histogram_value.bucket) == [1, 2, 3]
    assert list(counts.histogram_value.bucket_limit) == [0.5, 1.5, 2.5]


def test_tensorboard_is_told_no_path(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    MetricLog(["tensorboard"], tmp_path, CONFIG, "reat").close()
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"milestones" in written and b"someone" not in written


def test_wandb_offline_keeps_a_whole_run_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    run_dir = tmp_path / "run-7"
    run_dir.mkdir()
    history: list[tuple[dict[str, Any], dict[str, Any]]] = []
    stored = []
    for epoch in (1, 2):
        log = MetricLog(["wandb"], run_dir, CONFIG, "reat", history=history, attack="pgd10")
        log.epoch(*row(epoch))
        log.result(RESULT)
        log.close()
        history.append(row(epoch))
        (where,) = log.where
        folder = Path(where.removeprefix("W&B: wandb sync "))
        stored.append(next(folder.glob("run-*.wandb")))
    wandb.teardown()  # as at the end of a program; until then its service may still be writing
    run_id = (run_dir / WANDB_ID).read_text().strip()
    assert [path.name for path in stored] == [f"run-{run_id}.wandb"] * 2
    first, newest = (file.read_bytes() for file in stored)
    assert newest.count(b"train/loss") > first.count(b"train/loss")  # both epochs, not the last
    for name in (b"train/loss", b"eval/pgd10_tail", b"test/pgd20", b"run-7", b"milestones"):
        assert name in newest
    assert b"someone" not in newest

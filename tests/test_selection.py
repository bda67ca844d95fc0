"""Which weights are evaluated, chosen and tested in training, when, and how long it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import made_images
from made_run import SMALL, rows, run
from torch import Tensor

from reat_fast import checkpoint
from reat_fast.engine.distributed import World
from reat_fast.evaluate import evaluate
from reat_fast.networks.architectures import Network
from reat_fast.reporting.probe import probe_run
from reat_fast.reporting.run_record import read_run
from reat_fast.storage.save_pace import SavePace
from reat_fast.training import selection
from reat_fast.training.plan import make_plan
from reat_fast.training.run import Run


@pytest.mark.parametrize("saved", [True, False])
@pytest.mark.parametrize("flags", [[], ["--evaluation", "none"]], ids=["chosen", "tested"])
def test_a_network_whose_logits_are_no_numbers_is_given_no_accuracy(
    flags: list[str],
    saved: bool,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SavePace, "affordable", lambda pace: saved)  # before an evaluation
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--limit-batches", 1, "--epochs", 1, *flags]
    # Loss and weights of the only step are finite; no step comes after it.
    arguments += ["--schedule", "constant", "--lr", "1e6"]
    assert run(*arguments, "--run-dir", run_dir) == 1
    error = capsys.readouterr().err
    assert "some logits are NaN or infinite" in error
    if not flags:
        good = run_dir / ("checkpoint-previous.pt" if saved else "checkpoint-last.pt")
        back = f" in a new run, or go on with --resume {run_dir} --on-nonfinite rollback"
        cure = f"lower --lr{'' if saved else back}; the state before it is in {good}"
        assert f"in epoch 1: {cure}" in error
        assert checkpoint.load_checkpoint(good)["batch"] == 0
    assert not {"best.safetensors", "evaluation.json"} & {file.name for file in run_dir.iterdir()}


def test_official_evaluation_looks_at_the_test_set_every_epoch(data: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 2, "--evaluation", "official"]
    assert run(*arguments, "--held-out", "0", "--run-dir", run_dir) == 0
    metrics = rows(run_dir)
    best = max(metrics, key=lambda row: (float(row["eval_robust"]), int(row["epoch"])))
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["weights_epoch"] == int(best["epoch"])
    assert evaluation["attacks"]["pgd20"]["overall"] == float(best["eval_robust"])


@pytest.mark.parametrize("flags", [["--evaluation", "none"], ["--select", "last"]])
def test_without_evaluation_or_where_asked_the_last_weights_are_tested(
    flags: list[str], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two epochs the first is the best.
    monkeypatch.setattr(selection, "_rank", lambda found: (True, -found["epoch"]))
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 2, "--limit-batches", 1, *flags]
    assert run(*arguments, "--run-dir", run_dir) == 0
    assert (run_dir / "best.safetensors").exists() == ("last" in flags)
    tested = json.loads((run_dir / "evaluation.json").read_text())
    assert (tested["weights"], tested["weights_epoch"]) == ("last.safetensors", 2)


def test_averaged_weights_are_what_is_evaluated_chosen_and_saved(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[dict[str, Tensor]] = []

    def noting_evaluate(network: Network, *others: Any, **settings: Any) -> dict[str, Any]:
        evaluated.append({name: tensor.clone() for name, tensor in network.state_dict().items()})
        return evaluate(network, *others, **settings)

    monkeypatch.setattr(selection, "evaluate", noting_evaluate)
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 1, "--ema", 0.9]
    assert run(*arguments, "--run-dir", run_dir) == 0
    state = checkpoint.load_checkpoint(run_dir / "checkpoint-last.pt")
    averaged = {
        name.removeprefix("average."): tensor
        for name, tensor in state["step"].items()
        if name.startswith("average.")
    }
    assert set(averaged) == {
        n for n, tensor in state["model"].items() if tensor.is_floating_point()
    }
    assert all(not torch.equal(tensor, state["model"][n]) for n, tensor in averaged.items())
    saved = [
        checkpoint.load_model(run_dir / name).state_dict()
        for name in ("last.safetensors", "best.safetensors", "checkpoint-last.pt")
    ]
    assert len(evaluated) == 2  # to choose the epoch, and the test
    for weights in (*saved, *evaluated):
        assert all(torch.equal(weights[name], tensor) for name, tensor in averaged.items())


@pytest.mark.parametrize(
    ("flags", "found", "chosen"),
    [
        # Epochs 4 to 6 have a tenth of the learning rate: a lucky one before them does not count.
        (["--schedule", "multistep", "--milestones", 3], [10, 60, 20, 30, 50, 40], 5),
        (["--schedule", "multistep", "--milestones", 3], [10, 60, 20, 30, 30, 20], 5),
        # A learning rate that rises is not one that has fallen.
        (["--schedule", "onecycle", "--warmup", 0.5], [60, 10, 20, 30, 50, 40], 6),
        (["--schedule", "constant"], [10, 60, 20, 30, 50, 40], 2),
        (["--schedule", "multistep", "--milestones", 9], [10, 60, 20, 30, 50, 40], 2),
        (
            ["--schedule", "multistep", "--milestones", 3, "--evaluation", "official"],
            [10, 60, 20, 30, 50, 40],
            2,
        ),
    ],
)
def test_an_epoch_is_chosen_once_the_learning_rate_has_fallen(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: list[Any],
    found: list[float],
    chosen: int,
) -> None:
    left = list(found)

    def scripted(network: Network, image_set: Any, attacks: Any, *others: Any, **more: Any) -> Any:
        result = evaluate(network, image_set, attacks, *others, **more)
        for name, figures in result["attacks"].items():
            if name != "clean" and left:
                figures["balanced"] = figures["overall"] = left.pop(0)
        return result

    monkeypatch.setattr(selection, "evaluate", scripted)
    run_dir = tmp_path / "run"
    arguments = ["reat", *SMALL, "--data", data, "--epochs", 6, "--limit-batches", 1, *flags]
    assert run(*arguments, "--run-dir", run_dir) == 0
    assert [float(row["eval_robust"]) for row in rows(run_dir)] == found
    assert json.loads((run_dir / "evaluation.json").read_text())["weights_epoch"] == chosen


@pytest.mark.parametrize(
    ("flags", "passes"),
    [
        # 144 images with 2 x 2 + 3 passes for 3 epochs, the test's 24 with 1 and 41, 3 evaluations
        # of the 16 held out with 1 and 21.
        ([], 3 * 144 * 7 + 24 * 42 + 3 * 16 * 22),
        (["--eval-every", "2", "--select", "last"], 3 * 144 * 7 + 24 * 42 + 2 * 16 * 22),
        (["--attack", "fgsm-rs"], 3 * 144 * 5 + 24 * 42 + 3 * 16 * 22),
        (["--attack", "free", "--replays", "4"], 3 * 144 * 12 + 24 * 42 + 3 * 16 * 22),
        (["--evaluation", "none", "--limit-batches", "1"], 3 * 16 * 7 + 16 * 42),
    ],
)
def test_the_expected_time_counts_the_passes_that_are_left(
    flags: list[str], passes: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "seconds_per_step", lambda run: 2.0)
    small = [*SMALL, "--imbalance", "1", "--epochs", "3", *flags]
    arguments = ["reat", *small, "--data", str(data), "--run-dir", str(tmp_path / "run")]
    planned = Run(make_plan(arguments))
    assert selection.expected_seconds(planned) == pytest.approx(passes)
    planned.close()


def test_processes_share_the_training_and_the_evaluations(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "seconds_per_step", lambda run: 2.0)
    arguments = ["reat", *SMALL, "--imbalance", "1", "--epochs", "3", "--data", str(data)]
    planned = Run(make_plan([*arguments, "--run-dir", str(tmp_path / "run")]))
    alone = selection.expected_seconds(planned)
    planned.world = World(0, 4)
    assert selection.expected_seconds(planned) == pytest.approx(alone / 4)
    planned.close()


@pytest.mark.parametrize(
    ("flags", "due"),
    [
        ("--eval-every 3 --epochs 8 --select last", [2, 5, 7]),
        # Where the best epoch is looked for a fifth, once the learning rate has fallen: at 5 here.
        ("--eval-every 3 --epochs 8", [2, 5, 6, 7]),
        ("--eval-every 3 --epochs 8 --schedule constant", [2, 5, 7]),
        ("--eval-every 10 --epochs 9 --schedule multistep --milestones 3", [3, 5, 7, 8]),
        ("--eval-every 3 --epochs 8 --evaluation official", [2, 5, 7]),
        ("--epochs 8 --evaluation official", list(range(8))),
        ("--epochs 8 --select last", [4, 7]),
        ("--eval-every 3 --epochs 8 --evaluation none", []),
        ("--eval-every 3 --epochs 8 --held-out 0", []),
        ("--eval-every 9 --epochs 2", [1]),
    ],
)
def test_every_few_epochs_and_at_the_end_weights_are_evaluated(
    flags: str, due: list[int], data: Path, tmp_path: Path
) -> None:
    own = SMALL.index("--eval-every")
    small = [*SMALL[:own], *SMALL[own + 2 :]]
    arguments = ["reat", *small, *flags.split(), "--data", str(data)]
    planned = Run(make_plan([*arguments, "--run-dir", str(tmp_path / "run")]))
    epochs = range(planned.config.epochs)
    assert [epoch for epoch in epochs if selection.evaluation_is_due(planned, epoch)] == due
    planned.close()


@pytest.mark.parametrize(
    ("flags", "settled"),
    [
        ("--schedule multistep --milestones 2 4 --epochs 6", [2, 3, 4, 5]),
        ("--schedule multistep --milestones 2 4 --gamma 0.9 --epochs 6", []),
        ("--schedule constant --epochs 6", []),
        ("--schedule cosine --epochs 6", [3, 4, 5]),
        ("--schedule onecycle --warmup 0.25 --epochs 8", [5, 6, 7]),
        ("--schedule onecycle --warmup 0.75 --epochs 9", [8]),
        ("--schedule onecycle --warmup 0.25 --epochs 2", [1]),
        ("--schedule onecycle --evaluation official --epochs 4", []),
    ],
)
def test_epochs_count_once_the_learning_rate_fell_to_half_its_peak(
    flags: str, settled: list[int], data: Path, tmp_path: Path
) -> None:
    arguments = ["reat", *SMALL, *flags.split(), "--data", str(data)]
    planned = Run(make_plan([*arguments, "--run-dir", str(tmp_path / "run")]))
    epochs = range(planned.config.epochs)
    assert [epoch for epoch in epochs if selection.is_settled(planned, epoch)] == settled
    planned.lr_scale = 0.5  # after a rollback
    later = [epoch for epoch in epochs if selection.is_settled(planned, epoch)]
    assert set(settled) <= set(later)
    if "constant" in flags:
        assert later == list(epochs)
    planned.close()


def test_a_set_whose_classes_are_not_by_size_has_its_small_ones_for_the_tail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = np.repeat(np.arange(6), [4, 8, 12, 20, 30, 46])
    tested = np.arange(24) % 6
    images = {"x_train": made_images(labels, 3, 1), "x_test": made_images(tested, 3, 2)}
    np.savez(tmp_path / "own.npz", y_train=labels, y_test=tested, **images)
    small = [*SMALL, "--imbalance-profile", "as-is", "--epochs", 2]
    folder = tmp_path / "run"
    assert run("reat", *small, "--data", tmp_path / "own.npz", "--run-dir", folder) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    parts = {words[0]: words[1] for words in shown if len(words) == 5 and words[0].isdigit()}
    assert parts == {"5": "head", "4": "head", "3": "body", "2": "body", "1": "body", "0": "tail"}
    tested_as = json.loads((folder / "evaluation.json").read_text())["attacks"]["clean"]
    assert tested_as["tail"] == tested_as["per_class"][0]
    record = read_run(folder)
    assert record.order == [5, 4, 3, 2, 1, 0] and record.counts == [41, 27, 18, 11, 7, 3]
    assert record.class_names == ["5", "4", "3", "2", "1", "0"]
    found = probe_run(record, 12, None, torch.device("cpu"))
    assert found.labels.tolist() == [5, 4, 3, 2, 1, 0] * 2
    told = [int(n) for n in rows(folder)[-1]["ae_counts"].split()]
    assert record.ae_counts[-1] == told[::-1]

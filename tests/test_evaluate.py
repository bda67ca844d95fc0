"""Evaluation: figures from hand-made counts, attacks by name, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from made_data import made_images, made_npz
from torch import Tensor

from reat_fast import evaluate, reference, train
from reat_fast.attack import cross_entropy
from reat_fast.command import run_command
from reat_fast.data import ImageSet
from reat_fast.evaluate import Attack, evenly, figures
from reat_fast.kernels.prepare import prepare
from reat_fast.models import create_model
from reat_fast.report import accuracy_table


def test_figures_from_counts_made_by_hand() -> None:
    samples = [10, 10, 5, 5, 0, 4, 4, 2, 2, 4]
    correct = [10, 8, 5, 4, 0, 3, 2, 1, 1, 3]
    found = figures(correct, samples)
    per_class = [100, 80, 100, 80, None, 75, 50, 50, 50, 75]
    assert found["per_class"] == per_class
    assert found["overall"] == pytest.approx(100 * 37 / 46)
    assert found["balanced"] == pytest.approx(660 / 9)
    assert found["worst"] == 50
    assert found["head"] == pytest.approx(280 / 3)
    assert found["tail"] == pytest.approx(175 / 3)


def test_the_table_shows_the_figures() -> None:
    evaluation = {
        "attacks": {"clean": figures([3, 1], [4, 4]), "pgd20": figures([1, 0], [4, 0])},
        "class_names": ["cat", "<script>"],
        "train_counts": [40, 4],
    }
    lines = accuracy_table(evaluation).splitlines()
    assert lines[0].split() == ["accuracy", "in", "%", "images", "clean", "pgd20"]
    assert lines[2].split() == ["overall", "50.00", "25.00"]
    assert lines[-2].split() == ["cat", "head", "40", "75.00", "25.00"]
    assert lines[-1].split() == ["<script>", "tail", "4", "25.00", "-"]


def test_attacks_by_name() -> None:
    eps, step = 8 / 255, 2 / 255
    assert Attack.from_name("clean", eps, step).steps == 0
    assert Attack.from_name("fgsm", eps, step) == Attack("fgsm", 1, eps, random_start=False)
    assert Attack.from_name("pgd20", eps, step) == Attack("pgd20", 20, step, random_start=True)
    for name in ("pgd", "pgd0", "pgd-1", "PGD20", "aa", "cw"):
        with pytest.raises(ValueError, match=f"unknown attack '{name}'; attacks are clean, fgsm"):
            Attack.from_name(name, eps, step)


@pytest.fixture
def image_set() -> ImageSet:
    labels = np.arange(20, dtype=np.int64) % 4
    return ImageSet(made_images(labels, 3, seed=4), labels)


def test_figures_do_not_depend_on_the_batch_size_and_the_mode_stays(image_set: ImageSet) -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", 4, width=8).double()
    model.train()
    model.stem.bn.eval()  # type: ignore[operator, union-attr]
    attacks = [Attack.from_name(name, 0.1, 0.05) for name in ("clean", "fgsm", "pgd10")]
    whole = evaluate.evaluate(model, image_set, attacks, 4, eps=0.1, batch_size=64)
    parts = evaluate.evaluate(model, image_set, attacks, 4, eps=0.1, batch_size=3)
    assert whole == parts
    assert whole["samples"] == 20 and whole["per_class_samples"] == [5] * 4
    assert model.training and not model.stem.bn.training  # type: ignore[union-attr]


def test_fgsm_is_one_signed_step_judged_on_the_model(image_set: ImageSet) -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", 4, width=8).double().eval()
    # Pixels are float32 numbers, as everywhere in this package, before they become double.
    images = (torch.from_numpy(image_set.images).permute(0, 3, 1, 2).float() / 255).double()
    labels = torch.from_numpy(image_set.labels)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(model(leaf), labels), leaf)
    adv = (images + 0.1 * gradient.sign()).clamp(0, 1)
    right = model(adv).argmax(1) == labels
    attack = Attack.from_name("fgsm", 0.1, 0.05)
    found = evaluate.evaluate(model, image_set, [attack], 4, eps=0.1)["attacks"]["fgsm"]
    assert found["overall"] == pytest.approx(100 * float(right.double().mean()))


def test_robust_accuracy_is_that_of_the_reference_attack(image_set: ImageSet) -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", 4, width=8).eval()
    images, labels = torch.from_numpy(image_set.images), torch.from_numpy(image_set.labels)
    clean, start = prepare(images, torch.arange(20), 7, 0, 0.1, padding=0, flip=False)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    adv = reference.pgd(
        model, clean, labels, eps=0.1, step_size=0.02, steps=5, start=start - clean, loss=loss
    )
    expected = 100 * float((model(adv).argmax(1) == labels).double().mean())
    attack = Attack.from_name("pgd5", 0.1, 0.02)
    result = evaluate.evaluate(model, image_set, [attack], 4, eps=0.1, seed=7)
    # One image of 20 may sit on the border that a rounding decides.
    assert abs(result["attacks"]["pgd5"]["overall"] - expected) <= 5


def test_a_subset_is_spread_over_a_sorted_set() -> None:
    labels = np.repeat(np.arange(4), 10)
    image_set = ImageSet(np.zeros((40, 2, 2, 1), np.uint8), labels)
    assert evenly(image_set, 8).labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(evenly(image_set, 100)) == 40


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    data = made_npz(folder / "made.npz", classes=5)
    arguments = ["reat", "--dataset", "npz", "--data", data, "--model", "resnet8", "--width", 8]
    arguments += ["--imbalance", 0.2, "--steps", 1, "--epochs", 1, "--run-dir", folder / "run"]
    assert train.main([str(argument) for argument in arguments]) == 0
    return folder / "run"


def command(*arguments: object) -> int:
    return run_command(evaluate.main, [str(argument) for argument in arguments])


def test_the_command_repeats_the_figures_of_the_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((run_dir / "evaluation.json").read_text())
    assert command(run_dir, "--attacks", "clean", "pgd20") == 0
    shown = capsys.readouterr().out
    after = json.loads((run_dir / "evaluation.json").read_text())
    assert after["attacks"] == before["attacks"]
    assert after["train_counts"] == before["train_counts"]
    assert "clean  pgd20" in shown and "class 0" in shown or "0" in shown


def test_the_command_takes_weights_subset_and_output(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = [run_dir / "last.safetensors", "--attacks", "fgsm", "--subset", 10, "--out", out]
    assert command(*arguments) == 0
    result = json.loads(out.read_text())
    assert result["samples"] == 10 and list(result["attacks"]) == ["fgsm"]
    assert result["weights"] == "last.safetensors"


def test_bad_input_is_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = made_npz(tmp_path / "wide.npz", classes=6)
    for arguments, named in [
        ((run_dir, "--attacks", "aaa"), "unknown attack 'aaa'; attacks are clean, fgsm"),
        ((tmp_path / "absent",), "absent: no such run"),
        ((run_dir, "--data", wide), "has 6 classes"),
        ((run_dir, "--eps", "2"), "--eps 2.0: not in [0, 1]"),
        ((run_dir, "--subset", "0"), "--subset 0: must be at least 1"),
        ((run_dir, "--attack", "clean"), "--attack"),
        ((), "RUN"),
    ]:
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.startswith("error: ") and error.count("\n") == 1

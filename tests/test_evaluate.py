"""Evaluation: figures from hand-made counts, attacks by name, and the command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_data import made_images, made_npz
from PIL import Image
from torch import Tensor

from reat_fast import checkpoint, evaluate, export, reference, report, train
from reat_fast.attack import cross_entropy
from reat_fast.cli.command import run_command
from reat_fast.config import Config, parse
from reat_fast.data import ImageSet, load_run_data, make_splits
from reat_fast.evaluate import Attack
from reat_fast.evaluation.autoattack import AutoAttack
from reat_fast.evaluation.figures import figures, tail_by_share
from reat_fast.evaluation.search_state import STATES, SearchState
from reat_fast.kernels.prepare import prepare
from reat_fast.models import create_model
from reat_fast.reporting.tables import accuracy_table
from reat_fast.sources.lazy import FileImages
from reat_fast.training import selection


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
    assert lines[0].split() == ["accuracy", "in", "%", "trained", "on", "clean", "pgd20"]
    assert lines[2].split() == ["overall", "50.00", "25.00"]
    assert lines[-2].split() == ["cat", "head", "40", "75.00", "25.00"]
    assert lines[-1].split() == ["<script>", "tail", "4", "25.00", "-"]


def test_parts_and_table_go_by_the_size_of_the_classes() -> None:
    counts = [4, 40, 10, 90]
    found = figures([1, 2, 3, 4], [4, 4, 4, 4], counts)
    assert (found["head"], found["body"], found["tail"]) == (100, 62.5, 25)
    evaluation = {"attacks": {"clean": found}, "class_names": ["a", "b", "c", "d"]}
    shown = accuracy_table({**evaluation, "train_counts": counts}).splitlines()[-4:]
    assert [line.split() for line in shown] == [
        ["d", "head", "90", "100.00"],
        ["b", "body", "40", "50.00"],
        ["c", "body", "10", "75.00"],
        ["a", "tail", "4", "25.00"],
    ]


def test_the_tail_by_share_is_what_lies_beyond_80_per_cent() -> None:
    assert tail_by_share([3, 100, 10]) == [0, 2]
    longtail = [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100]  # CIFAR-10-LT, ratio 50
    assert tail_by_share(longtail) == [4, 5, 6, 7, 8, 9]
    assert tail_by_share([10, 80, 10]) == [0, 2]  # in any order; exactly 80 % is enough
    assert tail_by_share([5] * 10) == [8, 9]
    assert tail_by_share([7]) == []
    assert figures([1, 2, 3], [4, 4, 4], [10, 80, 10])["tail80"] == pytest.approx(50)
    assert figures([1, 2, 3], [4, 4, 4])["tail80"] is None
    assert figures([1], [4], [7])["tail80"] is None


def made_files(folder: Path) -> list[str]:
    """Write a set of image files of which one test image is damaged; return training flags."""
    made = np.random.RandomState(0)
    for split, number in (("train", 12), ("test", 3)):
        for label in range(2):
            place = folder / split / f"class{label}"
            place.mkdir(parents=True)
            for k in range(number):
                pixels = made.randint(0, 256, (12 + k % 2, 20, 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{k}.png")
    (folder / "test/class1/2.png").write_bytes(b"no image")
    data = ["--dataset", "folder", "--data", str(folder), "--imbalance-profile", "as-is"]
    small = ["--model", "resnet8", "--width", "8", "--epochs", "1", "--batch-size", "8"]
    return ["reat", *data, "--image-size", "8", *small, "--select", "last"]


def test_a_run_on_image_files_is_evaluated_on_the_pixels_it_was_tested_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = [*made_files(tmp_path / "data"), "--skip-bad", "--run-dir", str(run)]
    assert run_command(train.main, arguments) == 0
    tested = json.loads((run / "evaluation.json").read_text())
    for size in ([], ["--image-size", "8"]):
        assert run_command(evaluate.main, [str(run), *size, "--out", str(tmp_path / "out")]) == 0
        found = json.loads((tmp_path / "out").read_text())
        assert found["samples"] == tested["samples"] == 5
        assert found["attacks"] == tested["attacks"]
    other = ["--dataset", "npz", "--data", str(made_npz(tmp_path / "other.npz", classes=2))]
    assert run_command(evaluate.main, [str(run), *other, "--attacks", "clean", "--quiet"]) == 0


@pytest.mark.parametrize("split", ["test", "train"])
def test_an_image_that_only_evaluations_read_is_found_damaged_before_training(
    split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    arguments = [*made_files(data), "--quiet", "--run-dir", str(run), "--held-out", "0.2"]
    if split == "train":  # of which some are held out
        (data / "test/class1/2.png").unlink()
        config = parse(arguments, "reat")[1]
        dataset = load_run_data(config)
        splits = make_splits(dataset, imbalance=1, profile="as-is", held_out=config.held_out)
        assert isinstance(splits.held_out.images, FileImages)
        splits.held_out.images.paths[1].write_bytes(b"no image")
    assert run_command(train.main, arguments) == 2
    error = capsys.readouterr().err
    assert "cannot be read" in error and "--skip-bad" in error and error.count("\n") == 1
    assert not run.exists()


def test_a_test_image_that_is_damaged_while_a_run_trains_may_be_left_out_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out.json"
    arguments = [*made_files(tmp_path / "data"), "--quiet", "--run-dir", str(run)]
    evaluation = [str(run), "--quiet", "--out", str(out)]
    monkeypatch.setattr(selection, "refuse_damaged", lambda run: None)  # as if it were whole yet
    for main, asked in ((train.main, arguments), (evaluate.main, evaluation)):
        assert run_command(main, asked) == 2
        assert "class1/2.png: cannot be read" in capsys.readouterr().err
    assert run_command(report.main, [str(run)]) == 0
    assert "class1/2.png: cannot be read" in (run / "report.html").read_text()
    assert run_command(report.main, [str(run), "--skip-bad"]) == 0
    assert "cannot be read" not in (run / "report.html").read_text()
    assert run_command(evaluate.main, [*evaluation, "--skip-bad"]) == 0
    assert run_command(train.main, ["--resume", str(run), "--skip-bad"]) == 0
    for file in (out, run / "evaluation.json"):
        assert json.loads(file.read_text())["samples"] == 5
    # What is damaged of the training images since hinders no evaluation either.
    (tmp_path / "data/train/class0/1.png").write_bytes(b"damaged since")
    assert run_command(evaluate.main, [*evaluation, "--skip-bad"]) == 0
    capsys.readouterr()
    assert run_command(train.main, ["--resume", str(run), "--skip-bad"]) == 2
    error = capsys.readouterr().err
    assert "put back what is damaged" in error and "class0/1.png" in error
    assert error.count("\n") == 1


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


class DecodedOnDemand:
    """Images that are read by rows and cannot be taken for an array."""

    def __init__(self, images: np.ndarray) -> None:
        self.shape, self.dtype, self.most = images.shape, images.dtype, 0
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        self.most = max(self.most, len(rows))
        return self._images[rows]

    def __array__(self, *_: object) -> np.ndarray:
        raise AssertionError("the whole set was decoded")


@pytest.mark.parametrize("attack", ["aa", "aa-package", "l2aa", "l2aa-package"])
def test_autoattack_on_few_classes_is_refused_before_the_first_attack(
    image_set: ImageSet, attack: str
) -> None:
    model = create_model("resnet8", 3, width=8)
    attacks = [Attack.from_name(name, 0.1, 0.05) for name in ("clean", attack)]
    few = ImageSet(image_set.images, image_set.labels % 3)
    done: list[int] = []
    with pytest.raises(ValueError, match="^--attacks: Auto.* needs 4 classes, the model has 3"):
        evaluate.evaluate(model, few, attacks, 3, eps=0.1, progress=done.append)
    assert done == []


def test_images_are_read_batch_by_batch(image_set: ImageSet) -> None:
    torch.manual_seed(0)
    model = create_model("resnet8", 4, width=8)
    attacks = [Attack.from_name(name, 0.1, 0.05) for name in ("clean", "pgd2")]
    lazy = DecodedOnDemand(image_set.images)
    images = []
    read = ImageSet(lazy, image_set.labels)
    found = evaluate.evaluate(
        model, read, attacks, 4, eps=0.1, batch_size=8, progress=images.append
    )
    assert found == evaluate.evaluate(model, image_set, attacks, 4, eps=0.1, batch_size=8)
    assert lazy.most == 7 and images == [7, 7, 6, 7, 7, 6]


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


def test_a_subset_has_a_share_of_each_class_whatever_the_order_of_the_set() -> None:
    labels = np.repeat(np.arange(4), 10)
    image_set = ImageSet(np.zeros((40, 2, 2, 1), np.uint8), labels)
    assert image_set.evenly(8).labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    in_turn = ImageSet(np.arange(40, dtype=np.uint8).reshape(40, 1, 1, 1), np.arange(40) % 4)
    assert in_turn.evenly(8).labels.tolist() == [0, 1, 2, 3] * 2
    assert in_turn.evenly(8).images.ravel().tolist() == [0, 1, 2, 3, 20, 21, 22, 23]
    uneven = ImageSet(np.zeros((40, 2, 2, 1), np.uint8), np.array([0, 1, 1, 1] * 10))
    assert np.bincount(uneven.evenly(12).labels).tolist() == [3, 9]
    assert len(image_set.evenly(100)) == 40
    assert len(image_set.evenly(0)) == len(image_set.evenly(0).evenly(3)) == 0


def test_a_subset_of_files_is_not_decoded_before_it_is_looked_at(tmp_path: Path) -> None:
    files = FileImages([tmp_path / f"absent{k}.png" for k in range(6)], 2)
    subset = ImageSet(files, np.arange(6)).evenly(3)
    assert isinstance(subset.images, FileImages)
    assert [path.name for path in subset.images.paths] == [
        "absent0.png",
        "absent2.png",
        "absent4.png",
    ]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    data = made_npz(folder / "made.npz", classes=5)
    arguments = ["reat", "--dataset", "npz", "--data", data, "--model", "resnet8", "--width", 8]
    arguments += ["--imbalance", 0.2, "--steps", 1, "--epochs", 1, "--batch-size", 32]
    arguments += ["--run-dir", folder / "run"]
    assert train.main([str(argument) for argument in arguments]) == 0
    return folder / "run"


def test_attacks_search_in_the_arithmetic_of_the_run(run_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ["reat", "--fused", "--precision", "bf16", "--dataset", "npz"]
    arguments += ["--data", str(run_dir.parent / "made.npz"), "--model", "resnet8", "--width", "8"]
    arguments += ["--imbalance", "0.2", "--steps", "1", "--epochs", "1", "--batch-size", "32"]
    assert train.main([*arguments, "--run-dir", str(run)]) == 0
    assert command(run, "--attacks", "fgsm", "--quiet") == 0
    found = json.loads((run / "evaluation.json").read_text())
    assert found["precision"] == "bf16" and set(found["attacks"]) == {"clean", "pgd20", "fgsm"}
    assert command(run, "--attacks", "fgsm", "--precision", "float32", "--quiet") == 0
    assert json.loads((run / "evaluation-2.json").read_text())["precision"] == "float32"
    assert json.loads((run_dir / "evaluation.json").read_text())["precision"] == "float32"


def command(*arguments: object) -> int:
    return run_command(evaluate.main, [str(argument) for argument in arguments])


def test_the_command_repeats_the_figures_of_the_run(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((run_dir / "evaluation.json").read_text())
    assert command(run_dir, "--attacks", "clean", "pgd20") == 0
    shown = capsys.readouterr().out
    after = json.loads((run_dir / "evaluation.json").read_text())
    for name, figures_then in before["attacks"].items():
        found = after["attacks"][name]
        assert {part: found[part] for part in figures_then if part != "tail80"} == {
            part: value for part, value in figures_then.items() if part != "tail80"
        }
    assert after["tail80_classes"] == tail_by_share(after["train_counts"])
    assert after["attacks"]["clean"]["tail80"] is not None
    assert after["train_counts"] == before["train_counts"]
    assert "clean  pgd20" in shown and "class 0" in shown or "0" in shown


def test_attacks_are_gathered_and_a_part_of_the_images_stands_apart(run_dir: Path) -> None:
    before = json.loads((run_dir / "evaluation.json").read_text())
    assert command(run_dir, "--attacks", "fgsm", "--quiet") == 0
    gathered = json.loads((run_dir / "evaluation.json").read_text())
    assert gathered["attacks"] == {**before["attacks"], "fgsm": gathered["attacks"]["fgsm"]}
    assert gathered["weights_epoch"] == before["weights_epoch"]
    apart = run_dir / "evaluation-2.json"
    for flags in (["--subset", 5], ["--subset", 5, "--eps", "1/255"]):
        assert command(run_dir, "--attacks", "clean", *flags, "--quiet") == 0
        assert json.loads(apart.read_text())["samples"] == 5
        apart = run_dir / "evaluation-3.json"
    assert json.loads((run_dir / "evaluation.json").read_text()) == gathered
    for number in (2, 3):
        (run_dir / f"evaluation-{number}.json").unlink()


def test_another_test_set_of_the_same_name_and_size_stands_apart(
    run_dir: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    with np.load(run_dir.parent / "made.npz") as made:
        shifted = {**made, "x_test": 255 - made["x_test"]}
    np.savez(tmp_path / "shifted.npz", **shifted)
    before = (run / "evaluation.json").read_bytes()
    flags = ["--attacks", "clean", "--data", tmp_path / "shifted.npz", "--quiet"]
    assert command(run, *flags) == 0
    assert (run / "evaluation.json").read_bytes() == before
    assert set(json.loads((run / "evaluation-2.json").read_text())["attacks"]) == {"clean"}


def test_a_run_is_evaluated_at_the_radius_and_with_the_seed_it_was_tested_with(
    run_dir: Path, tmp_path: Path
) -> None:
    lone = tmp_path / "lone"
    shutil.copytree(run_dir, lone)
    changed = {"eps": 1 / 255, "step_size": 3 / 255, "seed": 7}
    config = json.loads((lone / "config.json").read_text())
    (lone / "config.json").write_text(json.dumps({**config, **changed}))
    assert command(lone, "--attacks", "pgd3", "--quiet") == 0
    found = json.loads((lone / "evaluation-2.json").read_text())
    # Not by the steps of its training: networks are compared by one attack.
    assert {name: found[name] for name in changed} == changed | {"step_size": 0.25 / 255}


def test_a_place_that_takes_no_file_is_named_before_the_search(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").touch()
    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "evaluate", lambda *_, **__: pytest.fail("searched"))
        assert command(run_dir, "--attacks", "aa", "--out", tmp_path / "file" / "out.json") == 2
    assert "out.json: cannot be written" in capsys.readouterr().err
    out = tmp_path / "new" / "out.json"
    assert command(run_dir, "--attacks", "clean", "--out", out, "--quiet") == 0
    assert [file.name for file in out.parent.iterdir()] == ["out.json"]


def test_a_file_that_is_no_evaluation_is_never_replaced(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "metrics.csv"
    out.write_text("epoch,loss\n")
    assert command(run_dir, "--attacks", "clean", "--out", out) == 2
    assert f"--out {out}: holds something else than an evaluation" in capsys.readouterr().err
    assert out.read_text() == "epoch,loss\n"
    out.write_text("")  # as mktemp makes one
    assert command(run_dir, "--attacks", "clean", "--out", out, "--quiet") == 0


def test_the_state_of_a_search_stays_until_its_result_is_written(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"steps": 2, "queries": 5, "state": None}
    monkeypatch.setattr(AutoAttack.__init__, "__kwdefaults__", short)

    def fail(*_: object) -> None:
        raise OSError("evaluation.json: cannot be written (No space left on device)")

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "write_beside_others", fail)
        assert command(run_dir, "--attacks", "aa", "l2aa", "--subset", 6) == 2
    assert len(list(run_dir.glob(STATES))) == 2 and "No space left" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(AutoAttack, "_survive", lambda *_: pytest.fail("attacked again"))
        assert command(run_dir, "--attacks", "aa", "l2aa", "--subset", 6, "--quiet") == 0
    assert not list(run_dir.glob(STATES))
    (run_dir / "evaluation-2.json").unlink()


def test_a_named_output_has_the_state_of_its_search_beside_it(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a run whose folder takes no file can be evaluated."""
    short = {"steps": 2, "queries": 5, "state": None}
    monkeypatch.setattr(AutoAttack.__init__, "__kwdefaults__", short)
    written: list[Path] = []
    keep = SearchState.write

    def write(state: SearchState, standing: dict[str, Any]) -> None:
        keep(state, standing)
        written.append(state.file)

    monkeypatch.setattr(SearchState, "write", write)
    out = tmp_path / "new" / "out.json"
    flags = ["--attacks", "aa", "--subset", 6, "--out", out, "--quiet"]
    assert command(run_dir, *flags) == 0
    assert {file.parent for file in written} == {out.parent}
    assert [file.name for file in out.parent.iterdir()] == ["out.json"]


def test_the_command_takes_weights_subset_and_output(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = [run_dir / "last.safetensors", "--attacks", "fgsm", "--subset", 10, "--out", out]
    assert command(*arguments) == 0
    result = json.loads(out.read_text())
    assert result["samples"] == 10 and list(result["attacks"]) == ["fgsm"]
    assert result["weights"] == "last.safetensors"


def test_the_table_says_what_it_was_measured_on(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alone.safetensors").write_bytes((run_dir / "last.safetensors").read_bytes())
    data = ["--dataset", "npz", "--data", run_dir.parent / "made.npz"]
    tested = json.loads((run_dir / "evaluation.json").read_text())["weights"]
    for place, flags, shown in (
        (run_dir, [],
         f"{tested} (epoch 1) on 30 of 30 test images of npz, L-infinity eps 8/255, step 2/255\n"),
        (tmp_path / "alone.safetensors", data, "alone.safetensors on 30 of 30 test images"),
        (run_dir, ["--subset", 10, "--restarts", 2, "--eps", "4/255"],
         "on 10 of 30 test images of npz, L-infinity eps 4/255, step 1/255, 2 restarts\n"),
        (run_dir, ["--subset", 10, "--attacks", "l2pgd1"],
         "of npz, L2 eps 128/255, step 15/255\n"),
    ):  # fmt: skip
        out = tmp_path / "out.json"
        attacks = [] if "--attacks" in flags else ["--attacks", "clean"]
        assert command(place, *flags, *attacks, "--out", out) == 0
        assert shown in capsys.readouterr().out


def test_a_flag_that_acts_on_none_of_the_attacks_is_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags, attacks, told in (
        (("--eps", "1"), ("clean", "l2pgd1"),
         "--eps 1: acts on none of clean, l2pgd1; it goes with attacks in L-infinity; the "
         "radius in L2 is --l2-eps\n"),
        (("--l2-eps", "1"), ("pgd1",),
         "--l2-eps 1: acts on none of pgd1; it goes with l2pgdN and l2aa\n"),
        (("--step-size", "0.1"), ("fgsm", "l2pgd1"),
         "--step-size 0.1: acts on none of fgsm, l2pgd1; it goes with pgdN, cwN and lsaN\n"),
        (("--restarts", "3"), ("fgsm",),
         "--restarts 3: acts on none of fgsm; it goes with pgdN, cwN, lsaN and l2pgdN\n"),
        (("--eps", "1", "--l2-eps", "1", "--step-size", "0.1", "--restarts", "3"),
         ("pgd1", "l2pgd1"), ""),
        (("--eps", "8/255", "--l2-eps", "128/255", "--step-size", "2/255", "--restarts", "1"),
         ("clean",), ""),
        (("--restarts", "2"), ("l2pgd1",), ""),
    ):  # fmt: skip
        arguments = [*flags, "--attacks", *attacks, "--subset", 5, "--out", tmp_path / "out.json"]
        assert command(run_dir, *arguments, "--quiet") == 0
        error = capsys.readouterr().err
        assert [line for line in error.splitlines(True) if line.startswith("--")] == (
            [told] if told else []
        )


def test_a_named_output_keeps_its_attacks_under_the_same_conditions_alone(
    run_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    for attack, subset, expected in (
        ("pgd2", 10, {"pgd2"}),
        ("fgsm", 10, {"pgd2", "fgsm"}),
        ("clean", 5, {"clean"}),
    ):
        flags = ["--attacks", attack, "--subset", subset, "--out", out, "--quiet"]
        assert command(run_dir, *flags) == 0
        assert set(json.loads(out.read_text())["attacks"]) == expected
    other = json.loads((tmp_path / "figures-2.json").read_text())
    assert set(other["attacks"]) == {"pgd2", "fgsm"} and other["samples"] == 10


def test_the_command_runs_the_attacks_of_the_field(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two steps and five queries a stage: that each has its part is shown in test_autoattack.
    short = {"steps": 2, "queries": 5, "state": None}
    monkeypatch.setattr(AutoAttack.__init__, "__kwdefaults__", short)
    out, names = tmp_path / "figures.json", ["clean", "fgsm", "pgd3", "cw3", "lsa3", "aa", "l2aa"]
    arguments = [run_dir, "--attacks", *names, "--subset", 12, "--restarts", 2, "--out", out]
    assert command(*arguments) == 0
    shown = capsys.readouterr()
    result = json.loads(out.read_text())
    assert list(result["attacks"]) == names and "lsa3" in shown.out
    assert shown.err.count("% stand after") == 10
    assert shown.err.count("L2 AutoAttack: ") == 5 and "L2 eps 128/255" in shown.out
    for name in ("aa", "l2aa"):
        after = result["attacks"][name]["after"]
        assert list(after) == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]
        assert after["clean"] == result["attacks"]["clean"]["overall"]
        assert after["square"] == result["attacks"][name]["overall"]
    assert result["restarts"] == 2 and result["precision"] == "float32"
    assert isinstance(result["warnings"], list)
    assert not list(run_dir.glob(STATES))
    assert command(*arguments, "--quiet") == 0
    assert capsys.readouterr().out == ""
    again = json.loads(out.read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_train_counts_may_be_given_where_no_run_tells(run_dir: Path, tmp_path: Path) -> None:
    weights, out = tmp_path / "alone.safetensors", tmp_path / "figures.json"
    weights.write_bytes((run_dir / "last.safetensors").read_bytes())
    arguments = [weights, "--dataset", "npz", "--data", run_dir.parent / "made.npz", "--out", out]
    assert command(*arguments, "--attacks", "clean") == 0
    result = json.loads(out.read_text())
    assert "train_counts" not in result and result["attacks"]["clean"]["tail80"] is None
    assert command(*arguments, "--attacks", "clean", "--train-counts", 9, 80, 5, 3, 3) == 0
    result = json.loads(out.read_text())
    assert result["train_counts"] == [9, 80, 5, 3, 3]
    assert result["tail80_classes"] == [0, 2, 3, 4]


def test_guards_speak_up(
    run_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate.guards, "warnings_for_model", lambda *_: ["this is doubtful"])
    out = tmp_path / "figures.json"
    assert command(run_dir, "--attacks", "clean", "--out", out, "--quiet") == 0
    assert capsys.readouterr().err == "warning: this is doubtful\n"
    assert json.loads(out.read_text())["warnings"] == ["this is doubtful"]


def test_weights_that_cannot_be_evaluated_are_refused(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, spec = checkpoint.load_model_and_spec(run_dir / "last.safetensors", torch.device("cpu"))
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    checkpoint.save_weights(tmp_path / "broken.safetensors", model, spec)
    arguments = ["--dataset", "npz", "--data", run_dir.parent / "made.npz", "--attacks", "clean"]
    assert command(tmp_path / "broken.safetensors", *arguments) == 2
    shown = capsys.readouterr()
    assert shown.err == "error: model: some logits are NaN or infinite; check the weights\n"
    assert shown.out == "" and not (tmp_path / "evaluation.json").exists()


def test_a_run_before_its_first_step_is_not_evaluated(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load_checkpoint(run_dir / checkpoint.CHECKPOINT)
    checkpoint.save_checkpoint(tmp_path, {**state, "epoch": 0, "batch": 0})
    shutil.copy(run_dir / "config.json", tmp_path)
    assert command(tmp_path, "--attacks", "clean") == 2
    assert (
        "is of before the first step; let its run save again, or go on with --resume"
        in capsys.readouterr().err
    )


def test_a_missing_package_says_how_to_get_it(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    before = (run_dir / "evaluation.json").read_text()
    assert command(run_dir, "--attacks", "aa-package") == 2
    error = capsys.readouterr().err
    assert error == (
        'error: --attacks aa-package needs pyautoattack: pip install "reat-fast[eval]"\n'
    )
    assert (run_dir / "evaluation.json").read_text() == before


def test_bad_input_is_one_line(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = made_npz(tmp_path / "wide.npz", classes=6)
    lone = tmp_path / "lone.safetensors"
    lone.write_bytes((run_dir / "last.safetensors").read_bytes())
    grey = made_npz(tmp_path / "grey.npz", classes=5, channels=1)
    for arguments, named in [
        ((run_dir, "--attacks", "aaa"), "--attacks: unknown attack 'aaa'; attacks are clean, fgsm"),
        ((tmp_path / "absent",), "absent: no such run"),
        (
            (lone,),
            "lone.safetensors: was trained on 5 classes, of which data is not known",
        ),
        ((run_dir, "--data", wide), "--dataset/--data: npz has 6 classes"),
        ((run_dir, "--data", grey), "--dataset/--data: npz has 1 channels"),
        ((run_dir, "--eps", "2"), "--eps 2.0: must lie in [0, 1], as images do; 8/255 is usual"),
        ((run_dir, "--attacks"), "--attacks: name at least one"),
        ((run_dir, "--seed", "-1"), "--seed -1: must lie in"),
        ((run_dir, "--dataset", "tiny-imagenet"), "tiny-imagenet needs --data FOLDER"),
        (
            (run_dir, "--train-counts", *"11111"),
            f"--train-counts: {run_dir} has them; leave it out",
        ),
        ((run_dir, "--out", run_dir), "is a folder; name a file"),
        ((run_dir, "--subset", "0"), "--subset 0: must be at least 1"),
        ((run_dir, "--restarts", "0"), "--restarts 0: must be at least 1"),
        ((run_dir, "--precision", "fp8"), "--precision"),
        ((run_dir / "last.safetensors", "--attack", "clean"), "--attack"),
        ((), "RUN"),
    ]:
        assert command(*arguments) == 2
        error = capsys.readouterr().err
        assert named in error and error.startswith("error: ") and error.count("\n") == 1


def test_an_export_that_meets_other_images_says_so_unless_they_were_named(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exported, own, other = tmp_path / "exported", run_dir.parent / "made.npz", tmp_path / "2.npz"
    assert run_command(export.main, [str(run_dir), "--to", str(exported)]) == 0
    held = dict(np.load(own))
    np.savez(other, **{**held, "x_test": held["x_test"][..., ::-1]})
    warning = f"the figures that {exported} came with are of other test images"
    for found, flags, said in (
        (own, [], False),
        (other, [], True),
        (other, ["--data", str(other)], False),
        (other, ["--subset", "10"], False),  # of fewer images none are known
    ):
        data = load_run_data(Config(dataset="npz", data=found))
        monkeypatch.setattr(evaluate, "load_run_data", lambda *_, data=data: data)
        (exported / "evaluation.json").unlink(missing_ok=True)  # whose warnings would stay
        arguments = [str(exported), "--dataset", "npz", "--attacks", "clean", *flags]
        assert run_command(evaluate.main, arguments) == 0
        assert (warning in capsys.readouterr().err) == said

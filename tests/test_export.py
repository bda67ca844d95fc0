"""Exports: what others read is the classifier, says what was measured, and is never half there."""

from __future__ import annotations

import importlib.util
import json
import math
import socket
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from damage import let_the_second_rename_fail
from made_data import made_images
from torch import Tensor, nn

from reat_fast import checkpoint, export
from reat_fast.checkpoint import ModelSpec, load_model
from reat_fast.cli.command import run_command
from reat_fast.config import Config
from reat_fast.evaluation.saved import weights_sha256
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.sharing.onnx_graph import TOLERANCE, compare_onnx, write_onnx
from reat_fast.storage import weights_file
from reat_fast.storage.config_file import to_json
from reat_fast.training.run_folder import train_counts

NAMES = ("a", "b", "c", "<script>|`d")
SPEC = ModelSpec("resnet8", 4, 3, 8, None, NAMES)
FIGURES = {"overall": 61.25, "balanced": 61.25, "worst": 40.0, "head": 80.0, "body": 60.0}
FIGURES |= {"tail": 52.125, "per_class": [80.0, 60.0, 65.0, 40.0]}
EVALUATION = {
    "weights": "best.safetensors",
    "weights_epoch": 3,
    "dataset": "made <b>",
    "samples": 24,
    "eps": 8 / 255,
    "step_size": 2 / 255,
    "seed": 0,
    "device": "cpu",
    "attacks": {"clean": FIGURES, "pgd20": {**FIGURES, "overall": 31.5, "tail": None}},
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of a small network with random weights."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for seed, name in enumerate(checkpoint.WEIGHTS):
        torch.manual_seed(seed)
        network = SPEC.build()
        with torch.no_grad():
            for tensor_name, tensor in network.state_dict().items():
                if ".bn." in tensor_name and tensor.is_floating_point():
                    tensor.add_(torch.rand_like(tensor) / 4)  # no longer the identity
        checkpoint.save_weights(run_dir / name, network, SPEC)
    config = Config(data=Path("/home/someone/data"), run_dir=run_dir, epochs=3)
    (run_dir / "config.json").write_text(to_json(config))
    split = {"dataset": "made <b>", "train_counts": [40, 20, 10, 4], "preset": "reat"}
    (run_dir / "split.json").write_text(json.dumps({**split, "image_shape": [8, 8, 3]}))
    known = {"weights_sha256": weights_sha256(run_dir / "best.safetensors")}
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION | known))
    return run_dir


def command(*arguments: object) -> int:
    return run_command(export.main, [str(argument) for argument in arguments])


def description(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def test_an_exported_folder_loads_as_the_run_does(run_dir: Path, tmp_path: Path) -> None:
    to = tmp_path / "new" / "exported"
    assert command(run_dir, "--to", to) == 0
    assert {path.name for path in to.iterdir()} == {"config.json", "model.safetensors"}
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(load_model(to)(images), load_model(run_dir)(images))


def test_the_description_says_what_was_trained_and_measured_and_no_path(
    run_dir: Path, tmp_path: Path
) -> None:
    assert command(run_dir, "--to", tmp_path / "to") == 0
    said = description(tmp_path / "to")
    assert said["architecture"] == "resnet8" and said["width"] == 8
    assert said["class_names"] == list(NAMES)
    assert said["channels"] == 3 and said["image_size"] == [8, 8]
    assert said["preset"] == "reat" and said["eps"] == 8 / 255
    assert said["training"]["epochs"] == 3
    assert said["evaluation"]["attacks"] == EVALUATION["attacks"]
    assert "someone" not in json.dumps(said) and str(tmp_path) not in json.dumps(said)


def test_an_exported_folder_is_exported_again_with_all_it_says(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert command(run_dir, "--to", first) == 0
    assert command(first, "--to", second) == 0
    said = description(first)
    assert said["evaluation"]["attacks"] == EVALUATION["attacks"]
    assert description(second) == said | {"weights": "model.safetensors"}
    assert "no figures in it" not in capsys.readouterr().out
    assert train_counts(first) == train_counts(run_dir) == said["train_counts"]
    (first / "config.json").write_text(json.dumps(said | {"training": 3}))
    assert command(first, "--to", tmp_path / "third") == 2
    assert "config.json: damaged" in capsys.readouterr().err


def test_figures_of_an_export_whose_weights_were_exchanged_are_left_out(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "the first"
    assert command(run_dir, "--to", first) == 0
    for name, value in (("last.safetensors", None), ("best.safetensors", "no longer told")):
        (first / "model.safetensors").write_bytes((run_dir / name).read_bytes())
        if value is not None:  # as older exports are
            told = description(first)
            del told["weights_sha256"]
            (first / "config.json").write_text(json.dumps(told))
        assert command(first, "--to", tmp_path / name) == 0
        assert description(tmp_path / name)["evaluation"] is None
        shown = capsys.readouterr().out
        assert f"python -m reat_fast.evaluate '{first / 'model.safetensors'}'" in shown


def test_figures_of_other_weights_are_left_out(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(run_dir / "last.safetensors", "--to", tmp_path / "to", "--format", "hub") == 0
    assert description(tmp_path / "to")["evaluation"] is None
    assert "no evaluation of last.safetensors" in capsys.readouterr().out
    card = (tmp_path / "to" / "README.md").read_text()
    assert "Not measured." in card and "61.25" not in card and "model-index" not in card


def test_figures_of_weights_that_were_trained_since_are_left_out(
    run_dir: Path, tmp_path: Path
) -> None:
    best = run_dir / "best.safetensors"
    before = best.read_bytes()
    best.write_bytes((run_dir / "last.safetensors").read_bytes())
    for number, content in enumerate((best.read_bytes(), before)):
        best.write_bytes(content)
        assert command(run_dir, "--to", tmp_path / f"{number}") == 0
        assert (description(tmp_path / f"{number}")["evaluation"] is None) == (number == 0)


def test_figures_are_looked_for_in_all_evaluations_of_a_run(run_dir: Path, tmp_path: Path) -> None:
    last = run_dir / "last.safetensors"
    own = {"weights": last.name, "weights_sha256": weights_sha256(last), "samples": 12}
    (run_dir / "evaluation-2.json").write_text(json.dumps(EVALUATION | own))
    assert command(last, "--to", tmp_path / "to") == 0
    assert description(tmp_path / "to")["evaluation"]["samples"] == 12


def test_a_run_that_selects_its_last_weights_is_exported_with_them(run_dir: Path) -> None:
    (run_dir / "config.json").write_text(to_json(Config(select="last")))
    assert checkpoint.find_weights(run_dir).name == "last.safetensors"
    (run_dir / "config.json").write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json: damaged"):
        checkpoint.find_weights(run_dir)


def test_a_run_before_its_first_step_is_not_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {"model": SPEC.build().state_dict(), "model_spec": dict(vars(SPEC))}
    checkpoint.save_checkpoint(tmp_path, {**state, "epoch": 0, "batch": 0})
    assert command(tmp_path, "--to", tmp_path / "to", "--image-size", 8) == 2
    assert (
        "is of before the first step; let its run save again, or go on with --resume"
        in capsys.readouterr().err
    )


def test_the_card_has_every_figure_with_its_attack_and_escapes_names(
    run_dir: Path, tmp_path: Path
) -> None:
    assert command(run_dir, "--to", tmp_path / "to", "--format", "hub") == 0
    card = (tmp_path / "to" / "README.md").read_text()
    assert "| overall | 61.25 | 31.50 |" in card
    assert "| tail | 52.12 | – |" in card
    assert "In %, on 24 test images of made &lt;b&gt;; attacks within L-infinity eps 8/255" in card
    assert "head, body and tail are the 1, 2 and 1 of them with the most to the fewest" in card
    assert "<b>" not in card.split("---\n")[2]
    assert "# license: yours to choose" in card


def test_the_card_names_the_preset(run_dir: Path, tmp_path: Path) -> None:
    split = json.loads((run_dir / "split.json").read_text())
    for preset, said in (
        ("a<b>", "Trained with the preset a&lt;b&gt; of reat_fast on 74 images of made"),
        (None, "Trained on 74 images of made"),
    ):
        (run_dir / "split.json").write_text(json.dumps(split | {"preset": preset}))
        to = tmp_path / f"to {preset}"
        assert command(run_dir, "--to", to, "--format", "hub") == 0
        assert said in (to / "README.md").read_text()


def test_the_card_names_the_ball_of_an_attack_in_l2(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "evaluation.json"
    told = json.loads(file.read_text())
    told["attacks"]["l2pgd20"] = told["attacks"]["pgd20"]
    file.write_text(json.dumps({**told, "l2_eps": 0.5, "restarts": 3}))
    assert command(run_dir, "--to", tmp_path / "to", "--format", "hub") == 0
    card = (tmp_path / "to" / "README.md").read_text()
    assert "attacks within L-infinity eps 8/255, step 2/255; L2 eps 0.5, step 0.0585938." in card
    assert '"l2pgd20, L2 eps 0.5, overall, in %"' in card
    measured = json.loads((tmp_path / "to" / "config.json").read_text())["evaluation"]
    assert measured["l2_eps"] == 0.5 and measured["restarts"] == 3


def test_the_front_matter_is_read_by_the_hub_library(run_dir: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface-hub")
    assert command(run_dir, "--to", tmp_path / "to", "--format", "hub") == 0
    data = hub.ModelCard.load(tmp_path / "to" / "README.md").data
    assert data.library_name == "reat_fast" and data.license is None
    assert data.model_name == "to"
    results = {result.metric_name: result.metric_value for result in data.eval_results}
    assert results["clean, overall, in %"] == 61.25
    assert results["pgd20, eps 8/255, overall, in %"] == 31.5
    assert "pgd20, eps 8/255, tail, in %" not in results
    assert {result.dataset_name for result in data.eval_results} == {"made <b>"}


class FakeHub(types.ModuleType):
    """Stands for huggingface_hub: notes the calls, or raises what it is told to."""

    __file__ = "huggingface_hub/__init__.py"

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("huggingface_hub")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def HfApi(self) -> FakeHub:  # noqa: N802
        return self

    def get_token(self) -> str:
        return "hf_secret"

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append((repository, options))

    def upload_folder(self, **options: Any) -> None:
        if self.error is not None:
            raise self.error
        options["files"] = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        self.calls.append(("upload", options))


def test_push_creates_a_private_repository_and_uploads_the_folder(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    to = tmp_path / "to"
    assert command(run_dir, "--to", to, "--format", "hub", "--push", "me/mine") == 0
    (created, options), (_, upload) = hub.calls
    assert created == "me/mine"
    assert options == {"repo_type": "model", "private": True, "exist_ok": True}
    assert upload["repo_id"] == "me/mine" and set(upload["allow_patterns"]) == set(export.FILES)
    assert upload["files"] == ["README.md", "config.json", "model.safetensors"]
    card = (to / "README.md").read_text()
    assert 'snapshot_download("me/mine")' in card and "# mine" in card


def test_push_calls_the_hub_library_as_it_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface-hub")
    api = create_autospec(hub.HfApi, instance=True)  # refuses arguments the real one has not
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    assert export.push(tmp_path, "me/mine", public=True) == "https://huggingface.co/me/mine"
    assert api.create_repo.call_args.kwargs["private"] is False
    assert api.upload_folder.call_args.kwargs["folder_path"] == tmp_path


def test_without_push_the_hub_is_not_asked(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert command(run_dir, "--to", tmp_path / "to", "--format", "hub") == 0
    assert hub.calls == []


def test_a_failed_push_is_one_line_without_the_token(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = FakeHub(RuntimeError("401 for Bearer hf_secret\nat https://example.org"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    to = tmp_path / "to"
    assert command(run_dir, "--to", to, "--format", "hub", "--push", "me/mine") == 2
    shown = capsys.readouterr()
    assert "hf_secret" not in shown.out + shown.err
    assert shown.err.count("\n") == 1 and "--push me/mine: 401 for Bearer ***" in shown.err
    assert "gives a token that may write there" in shown.err
    assert (to / "model.safetensors").exists()


def test_a_push_without_network_does_not_blame_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface-hub")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hub, "HfApi", partial(hub.HfApi, endpoint="http://127.0.0.1:9", token="x"))
    with pytest.raises(ValueError, match="once the Hugging Face Hub can be reached$"):
        export.push(tmp_path, "me/mine")
    error = OSError("no name")
    error.__context__ = socket.gaierror(-2, "Name or service not known")
    monkeypatch.setitem(sys.modules, "huggingface_hub", FakeHub(error))
    with pytest.raises(ValueError, match="no name; .* once the Hugging Face Hub can be reached$"):
        export.push(tmp_path, "me/mine")


def test_a_missing_extra_is_named_before_anything_is_written(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for package, extra, flags in [
        ("huggingface_hub", "hub", ["--format", "hub", "--push", "me/mine"]),
        ("onnx", "onnx", ["--format", "onnx"]),
    ]:
        monkeypatch.setitem(sys.modules, package, None)
        assert command(run_dir, "--to", tmp_path / "to", *flags) == 2
        assert f'pip install "reat-fast[{extra}]"' in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs onnx, onnxscript and onnxruntime",
)


@needs_onnx
def test_an_onnx_file_gives_the_logits_of_pytorch_for_any_batch(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    assert command(run_dir, "--to", to, "--format", "onnx") == 0
    assert {path.name for path in to.iterdir()} == {"config.json", "model.onnx"}
    assert "logits in onnxruntime differ by" in capsys.readouterr().out
    model = load_model(run_dir)
    for size in (1, 7):
        difference = compare_onnx(model, to / "model.onnx", torch.rand(size, 3, 8, 8))
        assert difference < TOLERANCE


@needs_onnx
def test_an_onnx_file_that_differs_is_not_kept(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = load_model(run_dir / "last.safetensors")

    def write_another(model: Network, file: Path, image_shape: tuple[int, int, int]) -> None:
        write_onnx(other, file, image_shape)

    monkeypatch.setattr(export, "write_onnx", write_another)
    assert command(run_dir, "--to", tmp_path / "to", "--format", "onnx") == 2
    assert "more than float32 explains" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@needs_onnx
def test_other_networks_and_sizes_export_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("preact_resnet18", 3, in_channels=1, width=8).eval()
    write_onnx(model, tmp_path / "model.onnx", (1, 20, 12))
    images = torch.rand(3, 1, 20, 12)
    difference = compare_onnx(model, tmp_path / "model.onnx", images)
    assert difference < TOLERANCE


def test_an_earlier_export_is_replaced_by_force_only_and_anything_else_never(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    assert command(run_dir / "last.safetensors", "--to", to) == 0
    assert command(run_dir, "--to", to) == 2
    assert "replace it with --force" in capsys.readouterr().err
    assert description(to)["weights"] == "last.safetensors"
    assert command(run_dir, "--to", to, "--force") == 0
    assert description(to)["weights"] == "best.safetensors"
    for kept in (run_dir, run_dir / "split.json"):
        assert command(run_dir, "--to", kept, "--force") == 2
        assert "holds something else" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "to"]


def test_a_failed_export_leaves_the_earlier_one(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = tmp_path / "to"
    assert command(run_dir / "last.safetensors", "--to", to) == 0

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(weights_file, "save_weights", fail)
    assert command(run_dir, "--to", to, "--force") == 2
    assert description(to)["weights"] == "last.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "to"]


def test_an_export_that_cannot_be_moved_into_place_leaves_the_earlier_one(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    to = tmp_path / "to"
    assert command(run_dir / "last.safetensors", "--to", to) == 0
    let_the_second_rename_fail(monkeypatch)
    assert command(run_dir, "--to", to, "--force") == 2
    assert f"{to}: cannot be written (Input/output error)" in capsys.readouterr().err
    assert description(to)["weights"] == "last.safetensors"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "to"]


def test_an_export_to_which_someone_added_a_file_is_not_replaced(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to = tmp_path / "to"
    assert command(run_dir, "--to", to) == 0
    (to / "thesis.tex").touch()
    assert command(run_dir, "--to", to, "--force") == 2
    assert f"--to {to}: holds thesis.tex; name a new folder" in capsys.readouterr().err
    assert (to / "thesis.tex").exists()


def test_evaluations_of_an_earlier_export_stay_when_it_is_replaced(
    run_dir: Path, tmp_path: Path
) -> None:
    to, names = tmp_path / "to", ["evaluation-2.json", "evaluation.json"]
    assert command(run_dir / "last.safetensors", "--to", to) == 0
    for name in names:
        (to / name).write_text(name)
    assert command(run_dir, "--to", to) == 2  # not without --force
    assert command(run_dir, "--to", to, "--force") == 0
    assert description(to)["weights"] == "best.safetensors"
    assert [file.read_text() for file in sorted(to.glob("evaluation*"))] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "to"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--push", "me/mine"], "--push me/mine: needs --format hub"),
        (["--format", "hub", "--push", "mine"], "--push mine: write OWNER/NAME"),
        (["--public"], "--public"),
        (["--image-size", "0"], "--image-size 0"),
        (["--image-size", "9" * 11], "--image-size 99999999999: must be below 2^31"),
        (["--format", "pickle"], "--format"),
    ],
)
def test_flags_that_cannot_be_are_refused(
    run_dir: Path,
    tmp_path: Path,
    flags: list[str],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(run_dir, "--to", tmp_path / "to", *flags) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not (tmp_path / "to").exists()


def test_what_a_run_does_not_say_is_asked_for_and_what_is_damaged_named(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "split.json").unlink()
    assert command(run_dir, "--to", tmp_path / "to") == 2
    assert "--image-size" in capsys.readouterr().err
    assert command(run_dir, "--to", tmp_path / "to", "--image-size", 8) == 0
    assert description(tmp_path / "to")["image_size"] == [8, 8]
    for text in ("[1]", "[" * 100_000):
        (run_dir / "evaluation.json").write_text(text)
        assert command(run_dir, "--to", tmp_path / "other", "--image-size", 8) == 2
        assert "evaluation.json: damaged" in capsys.readouterr().err
    assert command(tmp_path / "absent", "--to", tmp_path / "other") == 2
    assert "no such run" in capsys.readouterr().err


def made_batch() -> tuple[Tensor, Tensor]:
    """Images as RobustBench loads them: contiguous float32 [16, 3, 8, 8] in [0, 1]."""
    labels = torch.arange(16) % 4
    images = torch.from_numpy(made_images(labels.numpy(), 3, seed=1))
    return (images.permute(0, 3, 1, 2) / 255).contiguous(), labels


def test_a_loaded_model_meets_what_robustbench_asks_of_one(run_dir: Path) -> None:
    model = load_model(run_dir)
    images, labels = made_batch()
    assert not model.training and not any(module.training for module in model.modules())
    assert isinstance(model.to(torch.device("cpu")), nn.Module)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    right = 0
    with torch.no_grad():
        for first in range(0, 16, 5):
            logits = model(images[first : first + 5].to(torch.device("cpu")))
            assert logits.shape[1] == 4 and logits.dtype == torch.float32
            right += int((logits.max(1)[1] == labels[first : first + 5]).sum())
        whole = model(images)
        assert torch.equal(whole, model(images)), "randomised"
    assert right == int((whole.argmax(1) == labels).sum()), "depends on the batch"
    assert not torch.allclose(whole.sum(1), torch.ones(16)), "probabilities, not logits"
    (gradient,) = torch.autograd.grad(
        nn.functional.cross_entropy(model(images.requires_grad_()), labels), images
    )
    assert (gradient.flatten(1).abs().sum(1) > 0).all(), "zero gradients"


def test_autoattack_takes_a_loaded_model_as_it_is(
    run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pyautoattack = pytest.importorskip("pyautoattack", reason="needs pyautoattack")
    model = load_model(run_dir)
    images, _ = made_batch()
    with torch.no_grad():
        labels = model(images).argmax(1)
    adversary = pyautoattack.AutoAttack(
        model, eps=8 / 255, version="custom", attacks=["apgd-ce"], seed=0
    )
    with caplog.at_level("WARNING", logger="auto-attack"):
        adversarial, *_ = adversary.run_standard_evaluation(images, labels)
    # Its guards warn of probabilities, randomness, vanished gradients and dynamic defences.
    assert caplog.messages == []
    # Rounding of x + eps and of the difference: one unit in the last place of 1 each.
    assert (adversarial - images).abs().max() <= 8 / 255 + 2 * 2**-23
    assert adversarial.min() >= 0 and adversarial.max() <= 1
    assert not model.training


def test_torchattacks_takes_a_loaded_model_as_it_is(run_dir: Path) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="needs torchattacks and scipy")
    model = load_model(run_dir)
    images, _ = made_batch()
    with torch.no_grad():
        labels = model(images).argmax(1)
    adversarial = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=3)(images, labels)
    # Rounding as above.
    assert (adversarial - images).abs().max() <= 8 / 255 + 2 * 2**-23
    with torch.no_grad():
        before = nn.functional.cross_entropy(model(images), labels)
        after = nn.functional.cross_entropy(model(adversarial), labels)
    assert math.isfinite(after) and after > before
    assert not model.training

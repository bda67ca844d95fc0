"""Checkpoints: what is written comes back, and what is damaged or hostile does nothing."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from reat_fast import checkpoint
from reat_fast.checkpoint import CheckpointError, ModelSpec, load_model
from reat_fast.training.run_folder import new_run_dir

SPEC = ModelSpec("resnet8", 3, 1, 8, None, ("a", "b", "<script>"))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = SPEC.build()
    checkpoint.save_weights(tmp_path / "last.safetensors", model, SPEC)
    state = {"model": model.state_dict(), "model_spec": dict(vars(SPEC))}
    checkpoint.save_checkpoint(tmp_path, state)
    return tmp_path


def test_a_folder_to_go_on_with_is_named_as_a_shell_reads_it(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    state = {"model": SPEC.build().state_dict(), "model_spec": dict(vars(SPEC))}
    checkpoint.save_checkpoint(folder, {**state, "epoch": 0, "batch": 0})
    with pytest.raises(CheckpointError, match=f"go on with --resume '{folder}' or name another"):
        new_run_dir(folder, "reat")
    with pytest.raises(CheckpointError, match=f"go on with --resume '{folder}'$"):
        load_model(folder)


def test_a_model_comes_back_from_the_folder_the_weights_and_the_checkpoint(run_dir: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 1, 8, 8)
    torch.manual_seed(0)
    expected = SPEC.build().eval()(images)
    for name in ("", "last.safetensors", "checkpoint-last.pt"):
        model = load_model(run_dir / name)
        assert not model.training
        assert torch.equal(model(images), expected)
    _, spec = checkpoint.load_model_and_spec(run_dir)
    assert spec == SPEC


def test_a_run_before_its_first_step_has_no_model(tmp_path: Path) -> None:
    state = {"model": SPEC.build().state_dict(), "model_spec": dict(vars(SPEC)), "epoch": 0}
    checkpoint.save_checkpoint(tmp_path, {**state, "batch": 0})
    for path in (tmp_path, checkpoint.find_weights(tmp_path)):
        with pytest.raises(CheckpointError, match=f"the first step; .* --resume {tmp_path}$"):
            load_model(path)
    checkpoint.save_checkpoint(tmp_path, {**state, "batch": 1})
    assert isinstance(load_model(tmp_path), torch.nn.Module)


def test_the_best_weights_go_before_the_last(run_dir: Path) -> None:
    torch.manual_seed(9)
    best = SPEC.build()
    checkpoint.save_weights(run_dir / "best.safetensors", best, SPEC)
    assert torch.equal(load_model(run_dir).fc.weight, best.fc.weight)


def test_channels_last_weights_are_saved_whole(tmp_path: Path) -> None:
    model = SPEC.build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    checkpoint.save_weights(tmp_path / "last.safetensors", model, SPEC)
    assert torch.equal(load_model(tmp_path).stem.conv.weight, model.stem.conv.weight)


class Hostile:
    """A pickle that would create a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> object:
        return (Path.touch, (self.mark,))


def test_a_hostile_checkpoint_does_not_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "run", tmp_path / "checkpoint-last.pt"
    torch.save({"model_spec": Hostile(mark)}, file)
    with pytest.raises(CheckpointError, match="checkpoint-last.pt: damaged or not a checkpoint"):
        load_model(file)
    file.write_bytes(pickle.dumps(Hostile(mark)))
    with pytest.raises(CheckpointError, match="checkpoint-last.pt"):
        load_model(file)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["last.safetensors", "checkpoint-last.pt"])
def test_damaged_files_are_named(run_dir: Path, name: str) -> None:
    whole = (run_dir / name).read_bytes()
    for damaged in (b"", b"not it", whole[: len(whole) // 2], whole[:40]):
        (run_dir / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            load_model(run_dir / name)


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read all, so the refusal is made."""
    checkpoint.save_checkpoint(run_dir, {"epoch": 1})  # there is one before it to go on from

    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(zipfile, "ZipFile", refused)
    with pytest.raises(OSError, match=r"checkpoint-last\.pt: may not be read by this user; chmod"):
        checkpoint.load_newest_checkpoint(run_dir)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="no such run"):
        load_model(tmp_path / "absent")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="give a run folder"):
        load_model(tmp_path / "weights.bin")


def test_weights_that_do_not_fit_are_named(run_dir: Path) -> None:
    other = ModelSpec("resnet8", 4, 1, 8, None, ("a", "b", "c", "d"))
    checkpoint.save_weights(run_dir / "last.safetensors", SPEC.build(), other)
    with pytest.raises(CheckpointError, match="do not fit resnet8"):
        load_model(run_dir / "last.safetensors")


def test_a_device_that_is_not_there_is_not_blamed_on_the_file(run_dir: Path) -> None:
    for file in (run_dir, run_dir / "checkpoint-last.pt"):
        with pytest.raises(ValueError, match="^map_location nowhere: cannot be used"):
            load_model(file, "nowhere")

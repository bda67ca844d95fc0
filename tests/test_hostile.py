"""Disks that fill, folders that cannot be written, files that vanish or lie: one line, no loss."""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_run import SMALL, differences
from made_data import made_images, made_npz
from made_run import run
from PIL import Image
from safetensors.torch import save_file
from test_sources import as_images, batch, idx_bytes, python2_batch

from reat_fast import checkpoint, data, evaluate
from reat_fast.checkpoint import CHECKPOINT, PREVIOUS, CheckpointError, ModelSpec
from reat_fast.cli.command import run_command
from reat_fast.sources import cifar, download, formats
from reat_fast.sources.download import Remote
from reat_fast.sources.formats import DataError
from reat_fast.sources.lazy import FileImages
from reat_fast.storage import whole_files
from reat_fast.storage.config_file import from_json
from reat_fast.training.run import Run
from reat_fast.training.run_folder import train_counts

MakeDisk = Callable[[int], Path]
SPEC = ModelSpec("resnet8", 3, 1, 2, None, ("a", "b", "c"))


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return what was said on stderr, which has to be one line that begins with error."""
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.endswith("\n") and error[:-1].isprintable()
    return error[:-1]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*SMALL, "--data", data, "--run-dir", folder) == 0
    return folder


@pytest.fixture
def make_disk(tmp_path: Path) -> Iterator[MakeDisk]:
    """Give disks of so many bytes, mounted in memory."""
    disks: list[Path] = []

    def make(size: int) -> Path:
        disk = tmp_path / f"disk-{len(disks)}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
        with contextlib.suppress(OSError):
            if subprocess.run(command, capture_output=True).returncode == 0:
                disks.append(disk)
                return disk
        pytest.skip("a disk in memory needs root and mount")

    yield make
    for disk in disks:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def read_only(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Give an empty folder that nobody can write to."""
    if os.geteuid():
        folder = tmp_path / "read-only"
        folder.mkdir(mode=0o555)
    else:  # whom modes do not bind
        disk = request.getfixturevalue("make_disk")(1 << 20)
        folder = disk / "read-only"
        folder.mkdir()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    return folder


# Disks


def test_a_folder_that_cannot_be_written_is_named(
    data: Path, read_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (read_only, read_only / "run"):
        assert run(*SMALL, "--data", data, "--run-dir", folder) == 2
        assert str(folder) in only_line(capsys)
    assert not any(read_only.iterdir())


def test_a_disk_that_fills_up_keeps_the_checkpoint_before_and_the_run_goes_on(
    data: Path,
    whole: Path,
    make_disk: MakeDisk,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    disk = make_disk(4 << 20)
    folder, filler = disk / "run", disk / "filler"
    finish_epoch = Run.finish_epoch

    def fill_up(this: Run, *rows: object) -> None:
        finish_epoch(this, *rows)  # type: ignore[arg-type]
        if this.epoch == 1:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass

    with monkeypatch.context() as patched:
        patched.setattr(Run, "finish_epoch", fill_up)
        assert run(*SMALL, "--data", data, "--run-dir", folder) == 2
    error = only_line(capsys)
    assert f"{folder}/" in error and "No space left on device" in error
    assert f"then go on with --resume {folder}" in error
    for name in (CHECKPOINT, PREVIOUS):
        assert checkpoint.load_checkpoint(folder / name)["epoch"] in (0, 1)
    assert not list(folder.glob("*.part"))
    filler.unlink()
    assert run("--resume", folder) == 0
    assert differences(whole, folder) == []


@pytest.mark.parametrize("write", [0, 3, 5, 12, 31])
def test_a_failed_write_is_named_and_what_was_saved_before_is_whole(
    data: Path,
    whole: Path,
    tmp_path: Path,
    write: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, left = tmp_path / "run", write

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(whole_files.os, "fsync", fsync)
        patched.setattr(whole_files, "_sync_folder", lambda folder: None)
        assert run(*SMALL, "--data", data, "--run-dir", folder) == 2
    error = only_line(capsys)
    assert "cannot be written (No space left on device)" in error
    assert ("go on with --resume" in error) == (write > 3)  # else there is nothing to go on with
    assert not list(folder.glob("*.part"))
    # The first three describe the run, the fourth is the checkpoint of its beginning.
    again = ["--resume"] if write > 3 else [*SMALL, "--data", data, "--run-dir"]
    assert run(*again, folder) == 0
    assert differences(whole, folder) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_pytorchs_word_for_a_full_disk_is_understood(tmp_path: Path) -> None:
    (tmp_path / "state.pt.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"state\.pt: cannot be written \(No space left on device\)"):
        whole_files.write_atomically(
            tmp_path / "state.pt", lambda partial: torch.save(torch.rand(10_000), partial)
        )
    assert not any(tmp_path.iterdir())


def test_a_folder_that_takes_no_file_is_not_a_full_disk(read_only: Path) -> None:
    with pytest.raises(OSError, match=r"state\.pt: cannot be written \((Perm|Read-only)"):
        whole_files.write_atomically(
            read_only / "state.pt", lambda partial: torch.save(torch.rand(10), partial)
        )


def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let CIFAR-10 be a file of a megabyte on this machine."""
    (tmp_path / "served").write_bytes(bytes(1 << 20))
    remote = Remote("cifar-10-python.tar.gz", ((tmp_path / "served").as_uri(),), "0" * 32)
    monkeypatch.setitem(download.REMOTES, "cifar10", (remote,))


def test_a_cache_that_cannot_be_written_is_one_line(
    read_only: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served(tmp_path, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        data.main(["cifar10"])
    assert ended.value.code == 2
    error = only_line(capsys)
    assert "Read-only file system" in error or "Permission denied" in error
    assert f"into {read_only / 'reat_fast'}" in error


def test_a_cache_that_is_full_is_one_line_and_holds_no_file_under_its_final_name(
    make_disk: MakeDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    served(tmp_path, monkeypatch)
    disk = make_disk(1 << 16)
    with pytest.raises(SystemExit):
        data.main(["cifar10", "--to", str(disk)])
    assert "No space left on device" in only_line(capsys)
    assert [path.suffix for path in disk.iterdir()] == [".part"]


# Data that vanishes, is odd or huge


def write_list(folder: Path) -> Path:
    """Write image files of 8x8 in four classes, and the lists of them."""
    folder.mkdir()
    for part, count in (("train", 8), ("test", 2)):
        labels = np.repeat(np.arange(4), count)
        for at, image in enumerate(made_images(labels, 3, seed=1)):
            Image.fromarray(image).save(folder / f"{part}{at}.png")
        rows = [f"{part}{at}.png {label}\n" for at, label in enumerate(labels)]
        (folder / f"{part}.txt").write_text("".join(rows))
    return folder


def test_an_image_file_that_vanishes_between_two_epochs_is_named_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = write_list(tmp_path / "images")
    arguments = [*SMALL, "--dataset", "list", "--data", images, "--image-size", "8", "--epochs"]
    arguments += ["2", "--imbalance", "1", "--loader", "workers", "--workers", "0", "--run-dir"]
    assert run(*arguments, tmp_path / "whole") == 0
    gone, kept = images / "train3.png", tmp_path / "kept.png"
    finish_epoch = Run.finish_epoch

    def vanish(this: Run, *rows: object) -> None:
        finish_epoch(this, *rows)  # type: ignore[arg-type]
        gone.rename(kept)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "finish_epoch", vanish)
        capsys.readouterr()
        assert run(*arguments, tmp_path / "cut") == 2
    assert f"{gone}: not found" in only_line(capsys)
    assert run("--resume", tmp_path / "cut") == 2
    assert "1 of 32 images are not there" in only_line(capsys)
    kept.rename(gone)
    assert run("--resume", tmp_path / "cut") == 0
    assert differences(tmp_path / "whole", tmp_path / "cut") == []


def test_a_run_folder_that_is_moved_while_it_trains_goes_on_from_its_new_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, old, new = made_npz(tmp_path / "made.npz"), tmp_path / "old", tmp_path / "new"
    arguments = [*SMALL, "--data", data, "--epochs", "2", "--run-dir"]
    assert run(*arguments, tmp_path / "whole") == 0
    finish_epoch = Run.finish_epoch

    def move(this: Run, *rows: object) -> None:
        finish_epoch(this, *rows)  # type: ignore[arg-type]
        old.rename(new)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "finish_epoch", move)
        capsys.readouterr()
        assert run(*arguments, old) == 2
    assert f"{old}: was moved or removed while the run trained; go on with" in only_line(capsys)
    assert not old.exists() and run("--resume", new) == 0
    assert differences(tmp_path / "whole", new) == []


def test_ten_thousand_classes_of_one_image_train(tmp_path: Path) -> None:
    made = np.random.RandomState(0)
    x_train = made.randint(0, 256, (10_000, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(10_000)
    arrays = {"x_train": x_train, "y_train": labels, "x_test": x_train[::400]}
    np.savez(tmp_path / "many.npz", **arrays, y_test=labels[::400])
    arguments = [*SMALL, "--data", tmp_path / "many.npz", "--imbalance-profile", "as-is"]
    arguments += ["--batch-size", 500, "--limit-batches", 2, "--save-minutes", 60]
    assert run(*arguments, "--epochs", 1, "--run-dir", tmp_path / "run") == 0
    assert json.loads((tmp_path / "run/split.json").read_text())["held_out"] == 0
    assert checkpoint.load_model(tmp_path / "run").fc.weight.shape[0] == 10_000


def test_batches_of_one_image_train(tmp_path: Path) -> None:
    images = made_npz(tmp_path / "set.npz", classes=2, train=3, test=1)
    with np.load(images) as archive:
        larger = {k: v.repeat(4, 1).repeat(4, 2) if v.ndim == 4 else v for k, v in archive.items()}
    np.savez(images, **larger)  # 32x32, so that BatchNorm has more than one value of an image
    arguments = [*SMALL, "--data", images, "--imbalance", 1, "--batch-size", 1, "--epochs", 1]
    assert run(*arguments, "--eval-batch-size", 1, "--run-dir", tmp_path / "run") == 0
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        assert all(np.isfinite(float(row["loss"])) for row in csv.DictReader(file))


def test_an_image_of_2000_by_2000_trains_whole_and_resized(tmp_path: Path) -> None:
    images = np.random.RandomState(0).randint(0, 256, (2, 2000, 2000, 1)).astype(np.uint8)
    labels, arguments = np.arange(2), [*SMALL, "--imbalance", 1, "--batch-size", 1]
    arguments += ["--epochs", 1, "--evaluation", "none", "--limit-batches", 1, "--steps", 0]
    np.savez(
        tmp_path / "set.npz", x_train=images, y_train=labels, x_test=images[:1], y_test=labels[:1]
    )
    assert run(*arguments, "--data", tmp_path / "set.npz", "--run-dir", tmp_path / "whole") == 0
    Image.fromarray(images[0, ..., 0]).save(write_list(tmp_path / "images") / "train0.png")
    arguments += ["--dataset", "list", "--image-size", 8, "--data", tmp_path / "images"]
    assert run(*arguments, "--batch-size", 16, "--run-dir", tmp_path / "resized") == 0


def test_an_image_that_announces_more_pixels_than_it_has_is_refused(tmp_path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(name + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + name + content + crc

    size = (60_000).to_bytes(4, "big")
    header = chunk(b"IHDR", size + size + b"\x08\x02\0\0\0") + chunk(b"IDAT", zlib.compress(b""))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b""))
    with pytest.raises(DataError, match=r"bomb\.png: cannot be read .*3600000000 pixels"):
        FileImages([tmp_path / "bomb.png"], 8)[0]


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_jumps_changes_nothing(
    data: Path, whole: Path, tmp_path: Path, hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()

    def elsewhere_each_time() -> float:
        nonlocal now
        now += 3600 * hours
        return now

    monkeypatch.setattr(time, "time", elsewhere_each_time)
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * elsewhere_each_time()))
    assert run(*SMALL, "--data", data, "--run-dir", tmp_path / "run") == 0
    assert differences(whole, tmp_path / "run") == []
    with (tmp_path / "run/timing.csv").open(newline="") as file:
        assert all(0 <= float(row["seconds"]) < 600 for row in csv.DictReader(file))


@pytest.mark.filterwarnings("ignore:Creating legend")  # Matplotlib looks at the clock as well
def test_a_machine_that_sleeps_between_any_two_steps_ends_with_the_same_bits(
    data: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = 0.0

    def days_later(clock: Callable[[], float]) -> float:
        nonlocal slept
        slept += 86_400.0
        return clock() + slept

    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(time, name, partial(days_later, getattr(time, name)))
    assert run(*SMALL, "--data", data, "--run-dir", tmp_path / "run") == 0
    assert differences(whole, tmp_path / "run") == []
    with (tmp_path / "run/timing.csv").open(newline="") as file:
        assert all(float(row["seconds"]) >= 86_400 for row in csv.DictReader(file))


# Files that lie


def flipped(content: bytes, values: bytes) -> bytes:
    """Return a file with one bit changed within the bytes `values` that it holds."""
    at = content.index(values) + len(values) // 2
    return content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :]


def test_one_changed_bit_of_saved_weights_is_noticed(tmp_path: Path) -> None:
    model = SPEC.build()
    checkpoint.save_weights(tmp_path / "last.safetensors", model, SPEC)
    checkpoint.save_checkpoint(tmp_path, {"model": model.state_dict(), "model_spec": asdict(SPEC)})
    values = model.fc.weight.detach().numpy().tobytes()
    for name in ("last.safetensors", CHECKPOINT):
        checkpoint.load_model(tmp_path / name)
        (tmp_path / name).write_bytes(flipped((tmp_path / name).read_bytes(), values))
        with pytest.raises(CheckpointError, match=f"{name}: damaged"):
            checkpoint.load_model(tmp_path / name)


def test_one_changed_bit_of_a_packed_archive_is_noticed(tmp_path: Path) -> None:
    rows, labels = batch(3, 100)
    content = python2_batch(rows, labels, "fine_labels")
    plain, path = io.BytesIO(), tmp_path / "cifar-100-python.tar.gz"
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name in ("train", "test"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed = gzip.compress(plain.getvalue(), compresslevel=0)  # so that only its checksum tells
    path.write_bytes(packed)
    assert np.array_equal(cifar.read_cifar(path, 100).arrays[0], as_images(rows))
    path.write_bytes(flipped(packed, rows[1].tobytes()[:99]))
    with pytest.raises(DataError, match="cannot be read .CRC check failed"):
        cifar.read_cifar(path, 100)


@pytest.mark.parametrize(
    "header",
    ["[]", "3", "null", '"text"', "{", '{"num_classes": %s}' % ("9" * 5000), "[" * 50_000],
)
def test_weights_with_a_header_that_is_no_object_are_named(tmp_path: Path, header: str) -> None:
    save_file(SPEC.build().state_dict(), tmp_path / "model.safetensors", {"reat_fast": header})
    with pytest.raises(CheckpointError, match="model.safetensors: damaged reat_fast header"):
        checkpoint.load_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_classes", 10**9),
        ("width", 10**9),
        ("in_channels", 10**9),
        ("num_classes", "3"),
        ("num_classes", 2.5),
        ("name", ["resnet8"]),
        ("name", "resnet9"),
        ("width", True),
        ("class_names", 5),
        ("head", "unknown"),
    ],
)
def test_weights_with_a_header_that_lies_are_refused_before_a_network_is_built(
    tmp_path: Path, field: str, value: object
) -> None:
    header = json.dumps(asdict(SPEC) | {field: value})
    save_file(SPEC.build().state_dict(), tmp_path / "model.safetensors", {"reat_fast": header})
    with pytest.raises(ValueError, match="model.safetensors|resnet9") as refused:
        checkpoint.load_model(tmp_path / "model.safetensors")
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("field", checkpoint.POSITION)
def test_a_checkpoint_of_another_version_is_named(
    whole: Path, tmp_path: Path, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = checkpoint.load_checkpoint(whole / CHECKPOINT)
    del state[field]
    torch.save(state, tmp_path / CHECKPOINT)
    assert run("--resume", tmp_path) == 2
    assert f"{CHECKPOINT}: nothing to go on from, has no {field}" in only_line(capsys)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": {"average.fc.weight": "text"}},
        {"epoch": torch.zeros(2)},
        {"batch": torch.zeros(2)},
        {"epoch": "x"},
        {"model": {3: torch.zeros(2)}},
        {"model_spec": []},
    ],
)
def test_a_checkpoint_with_values_of_other_types_is_named(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    state = {"model": SPEC.build().state_dict(), "model_spec": asdict(SPEC), "epoch": 0, "batch": 1}
    checkpoint.save_checkpoint(tmp_path, state)
    checkpoint.load_model(tmp_path)
    checkpoint.save_checkpoint(tmp_path, state | changes)
    with pytest.raises(CheckpointError, match=CHECKPOINT):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        *({"preset": ["reat"]}, {"config": 3}, {"epoch": "x"}, {"code": []}, {"lr_scale": "x"}),
        *({"metrics": 3}, {"metrics": [3, 3, 3]}, {"timing": []}, {"best": 3}, {"spent": 3}),
        *({"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}),
        *({"step": {}}, {"step": []}, {"model": {}}, {"model": {3: torch.zeros(2)}}),
    ],
)
def test_a_run_is_not_gone_on_with_from_values_of_other_types(
    whole: Path, tmp_path: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(checkpoint.load_checkpoint(whole / CHECKPOINT) | changes, tmp_path / CHECKPOINT)
    capsys.readouterr()
    assert run("--resume", tmp_path) == 2
    assert only_line(capsys).startswith(f"error: {tmp_path / CHECKPOINT}: ")


@pytest.mark.parametrize(
    "content",
    [
        *(b"[" * 50_000, b"[]", b"{}", b"\xff", b""),
        *(b'{"train_counts": 5}', b'{"train_counts": [Infinity]}'),
    ],
)
def test_a_damaged_split_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "split.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"split\.json: damaged"):
        train_counts(tmp_path)


@pytest.mark.parametrize("counts", [[9, 5, 2], [9, 5, 2, 1] * 2, [9, 5, 2, -1], []])
def test_an_evaluation_refuses_a_folder_that_tells_of_other_classes_than_its_network_has(
    whole: Path, tmp_path: Path, counts: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    split = json.loads((folder / "split.json").read_text())
    (folder / "split.json").write_text(json.dumps(split | {"train_counts": counts}))
    capsys.readouterr()
    assert run_command(evaluate.main, [str(folder), "--attacks", "clean"]) == 2
    told = f"{folder}: has {len(counts)} train_counts for the 4 classes of the network; restore"
    assert told in only_line(capsys)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[" * 50_000, "not a configuration"),
        ('{"epochs": 2.5}', "epochs cannot be 2.5"),
        ('{"epochs": true}', "epochs cannot be True"),
        ('{"schedule": "step"}', "schedule cannot be 'step'"),
        ('{"milestones": "12"}', "milestones cannot be"),
        ('{"fused": "no"}', "fused cannot be 'no'"),
        ('{"training": 5}', "not a configuration"),
    ],
)
def test_a_configuration_of_other_types_is_refused(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="config.json: not a configuration") as refused:
        from_json(text)
    assert named in str(refused.value)


# Commands


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--width", 10**22), "--width 10000000000000000000000: must be below 2^31"),
        (("--eval-batch-size", 2**31), "--eval-batch-size 2147483648: must be below 2^31"),
        (("--lr", "1e308"), "--lr 1e+308: must be a finite number"),
        (("--split-seed", 2**32), "--split-seed 4294967296: must lie in [0, 2^32)"),
        (("--device", "cpu:1"), "--device cpu:1"),
        (("--width", 10**7), "out of memory"),
        (("--data", "\x1b[2J\n.npz"), r"--data \x1b[2J\n.npz: no such file"),
    ],
)
def test_odd_flags_are_one_line_and_leave_nothing_behind(
    data: Path,
    tmp_path: Path,
    arguments: tuple[object, ...],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*SMALL, "--data", data, *arguments, "--run-dir", tmp_path / "run") == 2
    assert named in only_line(capsys)
    assert not (tmp_path / "run").exists()


def test_class_names_cannot_talk_to_the_terminal(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with np.load(data) as archive:
        np.savez(tmp_path / "set.npz", **archive, class_names=["\x1b[2J", "a\nb", "\u202e", "d"])
    arguments = [*SMALL, "--data", tmp_path / "set.npz", "--run-dir", tmp_path / "run"]
    assert run(*arguments, "--epochs", 1, "--limit-batches", 1) == 0
    assert run_command(evaluate.main, [str(tmp_path / "run"), "--attacks", "clean"]) == 0
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
    assert r"\x1b[2J" in shown.out and r"a\nb" in shown.out


OFFLINE = """
import sys
from pathlib import Path

asked = []

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(arguments[1], (str, bytes)):  # an address of this machine's own
            asked.append((event, str(arguments[1])))
            raise OSError("this machine is offline")
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        asked.append((event, str(arguments[0])))
        raise OSError("this machine is offline")
    elif event == "subprocess.Popen" and Path(str(arguments[0])).name == "apt-get":
        asked.append((event, str(arguments[1])))

sys.addaudithook(watch)
from reat_fast import evaluate, export, report, train
from reat_fast.cli.command import run_command

folder = sys.argv[1]
small = "--epochs 1 --largest 20 --imbalance 0.5 --batch-size 8 --limit-batches 2 --device cpu"
codes = [
    run_command(train.main, ["quickstart", *small.split(), "--run-dir", folder]),
    run_command(train.main, ["--resume", folder]),
    run_command(evaluate.main, [folder, "--subset", "8", "--device", "cpu"]),
    run_command(report.main, [folder, "--images", "8", "--device", "cpu"]),
    run_command(export.main, [folder, "--to", folder + "-hub", "--format", "hub"]),
]
print("codes", codes, "asked", asked)
"""


def test_nothing_asks_the_network_and_no_token_is_written_down(tmp_path: Path) -> None:
    made = np.random.RandomState(0)
    (tmp_path / "data").mkdir()
    for name, count in zip(formats.IDX_FILES, (200, 200, 40, 40), strict=True):
        images = made.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        array = images if "images" in name else (np.arange(count) % 10).astype(np.uint8)
        (tmp_path / "data" / name).write_bytes(idx_bytes(array))
    tokens = {"HF_TOKEN": "hf_secretsecret", "WANDB_API_KEY": "5ec4e7" * 6}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(tmp_path / "run")],
        env={**os.environ, **tokens, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.stdout.endswith("codes [0, 0, 0, 0, 0] asked []\n"), done.stdout + done.stderr
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    for content in (*written, done.stdout.encode(), done.stderr.encode()):
        assert not any(token.encode() in content for token in tokens.values())

"""Training with torchrun: one run of several processes, and what happens when one of them dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from killed_run import SMALL
from made_run import rows
from PIL import Image

from reat_fast import checkpoint
from reat_fast.checkpoint import CHECKPOINT

pytestmark = pytest.mark.slow


@contextmanager
def torchrun(
    *arguments: object, restarts: int = 0, module: str = "reat_fast.train"
) -> Iterator[subprocess.Popen[str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", "2", "--max-restarts", str(restarts)]
    command = [*launcher, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    job = subprocess.Popen(command, text=True, env=environment, stdout=pipe, stderr=pipe)
    try:
        yield job
    finally:
        job.terminate()
        try:
            job.communicate(timeout=60)
        except (subprocess.TimeoutExpired, ValueError):
            job.kill()


def process_of_rank(rank: int, parent: int) -> int | None:
    """Find the process torchrun started for a rank."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            environment = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(stat[1]) == parent and f"RANK={rank}".encode() in environment:
            return int(entry.name)
    return None


def test_two_processes_make_one_run(data: Path, tmp_path: Path) -> None:
    arguments = [a for a in SMALL if a != "--quiet"]
    with torchrun(*arguments, "--data", data, "--run-dir", tmp_path / "two") as job:
        shown, error = job.communicate(timeout=280)
    assert job.returncode == 0, error
    assert shown.count("run folder") == 1 and "2 x 1 CPU threads" in shown
    alone = [sys.executable, "-m", "reat_fast.train", *SMALL, "--data", str(data)]
    subprocess.run([*alone, "--run-dir", tmp_path / "one"], check=True, capture_output=True)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        # Each image once an epoch, in whichever process.
        assert sum(map(int, one["ae_counts"].split())) == sum(map(int, two["ae_counts"].split()))
    first_one, first_two = (rows(tmp_path / name)[0] for name in ("one", "two"))
    # Float32 sums in another order may flip the sign of an attack step; losses stay close.
    assert float(first_two["loss"]) == pytest.approx(float(first_one["loss"]), rel=1e-2)
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["samples"] == 24


def test_two_processes_measure_what_one_does_and_one_of_them_speaks(
    data: Path, tmp_path: Path
) -> None:
    run, alone = tmp_path / "run", tmp_path / "alone.json"
    train = [sys.executable, "-m", "reat_fast.train", *SMALL, "--data", str(data)]
    subprocess.run([*train, "--epochs", "1", "--run-dir", run], check=True, capture_output=True)
    attacks = ["--attacks", "clean", "pgd3", "--restarts", "2", "--eps", "1/255"]
    with torchrun(run, *attacks, module="reat_fast.evaluate") as job:
        shown, error = job.communicate(timeout=120)
    assert job.returncode == 0, error
    assert shown.count("accuracy in %") == 1 and "evaluation-2.json written" in shown
    evaluate = [sys.executable, "-m", "reat_fast.evaluate", str(run), *attacks, "--out", str(alone)]
    subprocess.run(evaluate, check=True, capture_output=True)
    one, two = (json.loads(f.read_text()) for f in (alone, run / "evaluation-2.json"))
    assert {**two, "seconds": 0} == {**one, "seconds": 0}
    with torchrun(run, "--subset", "0", module="reat_fast.evaluate") as job:
        _, error = job.communicate(timeout=120)
    assert lines(error) == ["error: --subset 0: must be at least 1"] and job.returncode != 0


def position(folder: Path) -> tuple[int, int]:
    if not checkpoint.has_checkpoint(folder):
        return (0, 0)
    state = checkpoint.load_checkpoint(folder / CHECKPOINT)
    return (state["epoch"], state["batch"])


def wait_for(job: subprocess.Popen[str], folder: Path, beyond: tuple[int, int]) -> tuple[int, int]:
    """Wait until a job has saved a later position; return it."""
    deadline = time.monotonic() + 240
    while (reached := position(folder)) <= beyond:
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    return reached


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")
def test_a_dead_process_ends_the_job_and_a_restarted_job_goes_on(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    arguments = [*SMALL, "--data", data, "--epochs", 100_000, "--run-dir", folder]
    with torchrun(*arguments, restarts=3) as job:
        wait_for(job, folder, (0, 3))
        victim = process_of_rank(1, job.pid)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        time.sleep(2)  # what the other process saved until it noticed
        killed_at = position(folder)
        wait_for(job, folder, killed_at)  # the second attempt goes on from there
        job.terminate()
        _, error = job.communicate(timeout=60)
    assert job.returncode != 0
    assert error.count("another process of this job of 2 ended before its time") == 1
    assert f"go on with: torchrun --nproc-per-node 2 -m reat_fast.train --resume {folder}" in error
    assert position(folder) > killed_at
    assert checkpoint.load_checkpoint(folder / CHECKPOINT)["code"]["processes"] == 2


def test_restarts_need_a_named_folder(data: Path, tmp_path: Path) -> None:
    with torchrun(*SMALL, "--data", data, restarts=1) as job:
        _, error = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "torchrun --max-restarts: name the folder with --run-dir" in error


def test_a_refused_start_ends_the_waiting_process_at_once(data: Path, tmp_path: Path) -> None:
    (tmp_path / "somebody-elses").touch()
    with torchrun(*SMALL, "--data", data, "--run-dir", tmp_path) as job:
        _, error = job.communicate(timeout=120)
    assert f"error: --run-dir {tmp_path}: already holds files" in error
    assert "Unable to shutdown process" not in error  # torchrun kills after 30 s


def lines(error: str) -> list[str]:
    """Return what the program says, without torchrun's own account."""
    return [line for line in error.splitlines() if line.startswith(("error:", "stop"))]


def test_what_all_processes_find_wrong_is_said_once(data: Path, tmp_path: Path) -> None:
    with torchrun(*SMALL, "--data", data, "--batch-size", 5000) as job:
        _, error = job.communicate(timeout=120)
    told = "error: --batch-size 5000: the training set has 62 images; give at most 62"
    assert job.returncode != 0 and lines(error) == [told]


def test_a_wrong_flag_is_said_once_where_the_first_process_starts_last(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = "import os, time\nif os.environ.get('LOCAL_RANK') == '0':\n    time.sleep(1)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    places = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
    with torchrun(*SMALL, "--data", data, "--epochs", 0) as job:
        _, error = job.communicate(timeout=120)
    assert job.returncode != 0 and lines(error) == ["error: --epochs 0: must be at least 1"]


def test_what_one_process_finds_wrong_is_said_by_it_alone(tmp_path: Path) -> None:
    for split, number in (("train", 8), ("test", 2)):
        for label in "ab":
            folder = tmp_path / "data" / split / label
            folder.mkdir(parents=True)
            for k in range(number):
                Image.fromarray(np.full((8, 8, 3), 30 * k, np.uint8)).save(folder / f"{k}.png")
    damaged = tmp_path / "data/train/b/3.png"
    damaged.write_bytes(b"no image")
    arguments = [*SMALL, "--dataset", "folder", "--data", tmp_path / "data", "--image-size", 8]
    arguments += ["--imbalance-profile", "as-is", "--held-out", 0, "--run-dir", tmp_path / "run"]
    with torchrun(*arguments) as job:
        _, error = job.communicate(timeout=120)
    (told,) = (line for line in lines(error) if line.startswith("error:"))
    assert job.returncode != 0 and f"{damaged}: cannot be read" in told

"""Training runs in processes of their own that are killed, for the tests of resuming.

A server that has imported everything forks the runs, so that each starts in no time.
"""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

SMALL = [
    *("reat", "--dataset", "npz", "--model", "resnet8", "--width", "8", "--imbalance", "0.1"),
    *("--batch-size", "8", "--steps", "1", "--held-out", "0.1", "--eval-batch-size", "32"),
    *("--lr", "0.05", "--schedule", "onecycle", "--eval-every", "1", "--device", "cpu"),
    *("--epochs", "3", "--ema", "0.9", "--save-minutes", "0.00001", "--quiet"),
]


def server() -> multiprocessing.context.ForkServerContext:
    """Return the context whose processes have torch and the package loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reat_fast.train", "matplotlib.pyplot"])
    return context


def train_in_folder(data: str, folder: str, die_in_write: int | None) -> None:
    """Start the run in a folder or go on with it; die_in_write: half-way through the n-th file."""
    import torch

    from reat_fast import checkpoint, train
    from reat_fast.cli.command import run_command
    from reat_fast.storage import whole_files

    torch.set_num_threads(1)
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if die_in_write is not None:
        whole_files.write_atomically = _dying(whole_files.write_atomically, die_in_write)
    go_on = checkpoint.has_checkpoint(Path(folder))  # else the same command begins again
    arguments = ["--resume", folder] if go_on else [*SMALL, "--data", data, "--run-dir", folder]
    os._exit(run_command(train.main, arguments))


def _dying(write_atomically, number):  # type: ignore[no-untyped-def]
    left = number

    def write(path, fill):  # type: ignore[no-untyped-def]
        nonlocal left
        left -= 1

        def fill_half(partial: Path) -> None:
            fill(partial)
            if left < 0 and partial.stat().st_nlink == 1:  # a link to a good file is made at once
                os.truncate(partial, partial.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        write_atomically(path, fill_half)

    return write


def run_once(
    data: Path, folder: Path, *, seconds: float | None = None, die_in_write: int | None = None
) -> int:
    """Run until the end or until killed after so many seconds; returns the exit code."""
    process = server().Process(target=train_in_folder, args=(str(data), str(folder), die_in_write))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def kill_and_resume(data: Path, folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """Kill a run at random moments, every second time within a write, and let it end.

    Returns the kills that met the run at work, and how many runs it took to have them.
    """
    made, done, runs = random.Random(seed), 0, 0
    began = time.perf_counter()
    run_once(data, folder / "timed")
    whole = time.perf_counter() - began
    while done < kills:
        runs += 1
        code = -9
        while code != 0:
            within = made.random() < 0.5
            code = run_once(
                data,
                folder / f"run-{runs}",
                seconds=None if within else made.uniform(0, whole),
                die_in_write=made.randrange(40) if within else None,
            )
            assert code in (0, -9), f"exit code {code}"
            done += code == -9
            if done >= kills and code != 0:
                code = run_once(data, folder / f"run-{runs}")
                assert code == 0
    return done, runs


def differences(one: Path, other: Path) -> list[str]:
    """Name what differs between two finished runs that should be equal to the last bit."""
    names = ["metrics.csv", "last.safetensors", "best.safetensors"]
    found = [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)]
    figures = [json.loads((run / "evaluation.json").read_text())["attacks"] for run in (one, other)]
    return found if figures[0] == figures[1] else [*found, "evaluation.json"]

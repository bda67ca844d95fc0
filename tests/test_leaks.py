"""Long runs take no more than short ones: memory, threads and open files stay as they are."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed_run import SMALL
from made_data import made_npz

from reat_fast import train
from reat_fast.config import Config
from reat_fast.data import ImageSet
from reat_fast.loaders.choose import make_loader
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.resident import ResidentLoader
from reat_fast.models import create_model
from reat_fast.sources.beton_folder import write_beton
from reat_fast.step import TrainStep, make_optimizer
from reat_fast.training.run import Run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self"),
]

LOADERS = {"workers": "torch", "ffcv": "ffcv", "dali": "nvidia.dali"}
"""The loaders that start something, and the package each needs."""


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads_and_files() -> tuple[int, int, int]:
    """Count what the system knows of, not Python alone: threads, open files, child processes."""
    tasks = list(Path("/proc/self/task").iterdir())
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    return len(tasks), len(os.listdir("/proc/self/fd")), children


def stays_at(seen: tuple[int, int, int]) -> bool:
    """Say whether the counts are these, or become so once what is ending has ended."""
    deadline = time.monotonic() + 10
    while threads_and_files() != seen and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    return threads_and_files() == seen


def test_two_thousand_steps_over_fifty_epochs_leave_memory_flat() -> None:
    made = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (320, 8, 8, 3), generator=made, dtype=torch.uint8).numpy()
    image_set = ImageSet(images, (torch.arange(320) % 5).numpy())
    order = EpochOrder(image_set.labels, 8)  # 40 steps an epoch
    loader = ResidentLoader(image_set, order, torch.device("cpu"))
    config = Config(steps=1, ema=0.9, lr=0.01, precision="float32")
    torch.manual_seed(0)
    model = create_model("resnet8", 5, width=8)
    step = TrainStep(model, make_optimizer(model, config), [64] * 5, config)
    early, seen = 0, (0, 0, 0)
    taken = 0
    for epoch in range(50):
        for batch in loader.epoch(epoch):
            step.train_on(batch)
            taken += 1
        step.end_epoch()
        if epoch == 9:
            early, seen = resident_bytes(), threads_and_files()
    assert taken == 2000
    assert abs(resident_bytes() - early) <= 0.02 * early
    assert stays_at(seen)


@pytest.mark.parametrize(("name", "package"), [*LOADERS.items()])
def test_fifty_epochs_of_a_loader_leave_threads_files_and_processes_as_they_were(
    name: str, package: str, tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"needs {package}")
    images = torch.randint(0, 256, (48, 8, 8, 3), dtype=torch.uint8).numpy()
    image_set = ImageSet(images, (torch.arange(48) % 4).numpy())
    beton, rows = None, None
    if name == "ffcv":
        from ffcv.pipeline.compiler import Compiler

        Compiler.set_enabled(False)  # compiling takes seconds
        beton, rows = tmp_path / "train.beton", np.arange(48)
        write_beton(beton, images, image_set.labels)
    order, cpu = EpochOrder(image_set.labels, 8), torch.device("cpu")
    loader, _ = make_loader(image_set, order, cpu, loader=name, workers=1, beton=beton, rows=rows)
    early, seen, batches = 0, (0, 0, 0), 0
    for epoch in range(50):
        batches += sum(len(batch.labels) == 8 for batch in loader.epoch(epoch))
        if epoch == 9:
            early, seen = resident_bytes(), threads_and_files()
    assert batches == 300
    assert stays_at(seen)
    assert abs(resident_bytes() - early) <= 0.02 * early
    loader.close()


def test_epochs_that_evaluate_and_save_leave_memory_threads_and_files_flat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, tuple[int, int, int]]] = []
    finish_epoch = Run.finish_epoch

    def counted(this: Run, *rows: Any) -> None:
        finish_epoch(this, *rows)
        seen.append((resident_bytes(), threads_and_files()))

    monkeypatch.setattr(Run, "finish_epoch", counted)
    data = made_npz(tmp_path / "made.npz")
    arguments = [*SMALL, "--data", str(data), "--epochs", "10", "--save-minutes", "60"]
    assert train.main([*arguments, "--run-dir", str(tmp_path / "run")]) == 0
    (early, counts), (late, last) = seen[3], seen[-1]
    assert len(seen) == 10 and last == counts
    assert abs(late - early) <= 0.02 * early

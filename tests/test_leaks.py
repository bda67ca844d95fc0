"""Long runs take no more than short ones: memory, threads and open files stay as they are."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest
import torch

from reat_fast.config import Config
from reat_fast.data import ImageSet
from reat_fast.loaders.order import EpochOrder
from reat_fast.loaders.resident import ResidentLoader
from reat_fast.models import create_model
from reat_fast.step import TrainStep, make_optimizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc/self"),
]


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def threads_and_files() -> tuple[int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


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
    early, seen = 0, (0, 0)
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
    assert threads_and_files() == seen

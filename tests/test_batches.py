"""How many images are attacked at once: what memory allows on a GPU, as even batches as may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from made_data import made_npz
from made_victim import make_victim
from torch import Tensor

from reat_fast import evaluate, train
from reat_fast.cli.command import run_command
from reat_fast.engine.precision import Precision
from reat_fast.evaluation import batches
from reat_fast.evaluation.victim import Victim

MIB = 2**20


@pytest.mark.parametrize(
    ("images", "most", "size"),
    [(10_000, 4096, 3334), (10_000, 500, 500), (10, 4, 4), (9, 4, 3), (3, 500, 3), (1, 1, 1)],
)
def test_batches_are_even_and_as_few_as_may_be(images: int, most: int, size: int) -> None:
    assert batches.even(images, most) == size
    parts = [len(part) for part in torch.arange(images).split(size)]
    assert len(parts) == -(-images // most) and max(parts) <= most
    assert max(parts) - min(parts) < len(parts)


def test_no_images_make_no_batch() -> None:
    assert batches.even(0, 500) == 0


@pytest.mark.parametrize(
    ("free", "each", "size"),
    [
        (78 * 1024 * MIB, 2 * MIB, 4096),  # no more, whatever fits
        (10 * 1024 * MIB, 2 * MIB, 1536),
        (6 * 1024 * MIB, 9 * MIB, 204),
        (100 * MIB, 9 * MIB, 16),  # no fewer, which memory may refuse
    ],
)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_batch_is_what_fits_into_free_memory(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, free: int, each: int, size: int
) -> None:
    seen: list[tuple[int, ...]] = []
    held = 300 * MIB  # the model and what others hold
    monkeypatch.setattr(batches, "can_capture", lambda device: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held)
    # In the first pass workspaces are made.
    monkeypatch.setattr(
        torch.cuda,
        "max_memory_allocated",
        lambda device: held + 256 * each + (len(seen) < 2) * 4096 * MIB,
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 1024 * MIB))
    gradient = Victim.gradient

    def noted(victim: Victim, images: Tensor, objective: Any) -> Any:
        seen.append(tuple(images.shape))
        return gradient(victim, images, objective)

    monkeypatch.setattr(Victim, "gradient", noted)
    assert batches.fitting(make_victim(), (3, 8, 8), precision) == size
    assert seen == [(256, 3, 8, 8)] * 2


def test_on_a_cpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("measured on a CPU")

    monkeypatch.setattr(batches, "attacked", fail)
    assert batches.fitting(make_victim(), (3, 8, 8), "float32") == 500


@pytest.mark.parametrize(
    ("flags", "size"),
    [([], 308), (["--attacks", "clean"], 500), (["--batch-size", "9"], 9)],
)
def test_a_batch_is_measured_where_attacks_leave_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], size: int
) -> None:
    data, run = made_npz(tmp_path / "made.npz"), tmp_path / "run"
    small = ["reat", "--dataset", "npz", "--data", str(data), "--model", "resnet8", "--width", "8"]
    small += ["--imbalance", "0.2", "--batch-size", "16"]
    small += ["--steps", "1", "--epochs", "1", "--run-dir", str(run), "--device", "cpu", "--quiet"]
    assert run_command(train.main, small) == 0
    seen: list[int] = []
    plain = evaluate.evaluate

    def noted(*given: Any, batch_size: int, **settings: Any) -> Any:
        seen.append(batch_size)
        return plain(*given, batch_size=batch_size, **settings)

    monkeypatch.setattr(evaluate, "evaluate", noted)
    monkeypatch.setattr(batches, "fitting", lambda model, size, precision: 100 * size[0] + size[1])
    attacks = [] if "clean" in flags else ["--attacks", "clean", "pgd1"]
    given = [str(run), *attacks, *flags, "--device", "cpu", "--quiet"]
    assert run_command(evaluate.main, given) == 0
    assert seen == [size]

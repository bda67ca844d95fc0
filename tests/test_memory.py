"""Freed memory stays with the process where glibc can be told so; a GPU is chosen and counted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from reat_fast.cli.command import choose_device
from reat_fast.engine.memory import forget_peak_memory

FAULTS = """
import resource, sys, torch
from reat_fast.engine.memory import give_back_freed_memory, keep_freed_memory
if sys.argv[1] != "default" and not keep_freed_memory():
    sys.exit(3)
if sys.argv[1] == "give back" and not give_back_freed_memory():
    sys.exit(3)
for _ in range(25):
    torch.ones(12_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this system's malloc has no mallopt")
    return int(done.stdout)


def test_large_blocks_are_taken_again_without_page_faults() -> None:
    # 20 blocks of 48 MB, more than glibc keeps by itself: 460 huge pages or 234,375 small ones.
    assert faults("keep") < 20
    assert faults("default") > 100


def test_what_was_told_can_be_undone() -> None:
    assert faults("give back") > 100


def test_the_peak_of_a_gpu_is_counted_anew_and_only_there(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: called.append("empty"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: called.append("reset"))
    forget_peak_memory(torch.device("cpu"))
    assert called == []
    forget_peak_memory(torch.device("cuda", 0))
    assert called == ["empty", "reset"]


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert str(choose_device(name)) == name
    assert chosen == [torch.device("cuda", 1)]

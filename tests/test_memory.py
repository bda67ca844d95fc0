"""Freed memory stays with the process where glibc can be told so; a GPU is chosen and counted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from reat_fast.cli.command import choose_device
from reat_fast.config import Config
from reat_fast.engine.memory import forget_peak_memory, shelter_thin_convolutions_
from reat_fast.models import create_model
from reat_fast.step import TrainStep, make_optimizer

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


DAMAGE = """
import torch
from torch import nn
from reat_fast.engine.memory import shelter_thin_convolutions_
for channels in (3, 8, 12):
    conv = nn.Conv2d(channels, 16, 1, 2).to(memory_format=torch.channels_last)
    assert shelter_thin_convolutions_(nn.Sequential(conv)) == [conv]
    x = torch.rand(16, channels, 64, 64).to(memory_format=torch.channels_last)
    for _ in range(20):
        conv.weight.grad = None
        conv(x).square().sum().backward()
    exact = conv.weight.detach().double().requires_grad_()
    bias = conv.bias.detach().double()
    nn.functional.conv2d(x.double(), exact, bias, 2).square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.double(), exact.grad, rtol=1e-4, atol=0)
"""


def faults(how: str) -> int:
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this system's malloc has no mallopt")
    return int(done.stdout)


def test_thin_strided_convolutions_damage_no_memory() -> None:
    # Without the shelter PyTorch ends the process here, on a CPU with AVX2 or AVX-512.
    subprocess.run([sys.executable, "-c", DAMAGE], check=True)


@pytest.mark.parametrize(
    ("conv", "sheltered"),
    [
        (nn.Conv2d(15, 8, 1, 2), True),
        (nn.Conv2d(16, 8, 1, 2), False),  # fills a register
        (nn.Conv2d(8, 8, 1), False),
        (nn.Conv2d(8, 8, 3, 2, 1), False),
    ],
)
def test_only_thin_strided_convolutions_of_one_pixel_change_their_layout(
    conv: nn.Conv2d, sheltered: bool
) -> None:
    conv.to(memory_format=torch.channels_last)
    assert bool(shelter_thin_convolutions_(conv)) is sheltered
    x = torch.rand(2, conv.in_channels, 8, 8).to(memory_format=torch.channels_last)
    assert conv(x).is_contiguous() is sheltered
    assert not shelter_thin_convolutions_(conv)  # once is enough


def test_a_step_shelters_the_network_that_it_trains() -> None:
    """Of one that is not made by the training command, too."""
    config = Config(device="cpu")
    model = create_model("resnet8", 10, width=8).to(memory_format=torch.channels_last)
    TrainStep(model, make_optimizer(model, config), [8] * 10, config)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for conv in convs:
        x = torch.rand(2, conv.in_channels, 8, 8).to(memory_format=torch.channels_last)
        thin = conv.kernel_size == (1, 1) and conv.stride == (2, 2) and conv.in_channels < 16
        assert conv(x).is_contiguous() is thin
    assert not shelter_thin_convolutions_(model)  # all of them are, already


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

"""The work of a method is what its steps multiply, and what the documentation says."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from reat_fast.config import PRESETS, Config
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.methods.work import work_of_training, work_per_image
from reat_fast.models import create_model
from reat_fast.step import TrainStep, make_optimizer

COUNTS = [40, 24, 12, 7, 4]
FLAGS = {f"--attack {attack}": Config(attack=attack) for attack in ("fgsm-rs", "n-fgsm", "free")}  # type: ignore[arg-type]
BOTH = {
    f"{name} free": dataclasses.replace(PRESETS[name], attack="free", attack_loss="auto")
    for name in ("trades", "mart")
}
CASES = {name: config for name, config in PRESETS.items() if name != "quickstart"} | FLAGS | BOTH


class Flops(TorchDispatchMode):
    """Add up what convolutions and products compute; FlopCounterMode's hooks forbid grad()."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


def multiplied(config: Config, epoch: int, images: Tensor, labels: Tensor) -> float:
    """Return the multiplications of a step of an epoch, in those of a forward pass."""
    model = create_model("resnet8", len(COUNTS), width=16)
    if config.head == "cosine":
        use_cosine_head(model).compensate_(COUNTS, 0.1)
    step = TrainStep(model.train(), make_optimizer(model, config), COUNTS, config)
    step.epoch.fill_(epoch)
    step.begin_epoch()
    with Flops() as forward, torch.no_grad():
        model(images)
    with Flops() as whole:
        step(images, labels)
    return whole.total / forward.total


@pytest.mark.parametrize(
    ("name", "epoch"),
    [*((name, config.epochs - 1) for name, config in CASES.items()), ("reat-plus", 0)],
)
def test_the_work_is_what_a_step_multiplies(name: str, epoch: int) -> None:
    torch.manual_seed(0)
    images, labels = torch.rand(5, 3, 8, 8), torch.arange(5)
    # The eager form: others multiply in ways of their own.
    config = dataclasses.replace(CASES[name], attack_form="eager", graph="off", device="cpu")
    # The update does without the gradient of the images, which is a part of the first convolution.
    expected = work_per_image(config, epoch)
    assert multiplied(config, epoch, images, labels) == pytest.approx(expected, rel=0.03)


def test_the_work_is_what_the_documentation_says() -> None:
    text = (Path(__file__).parent.parent / "docs" / "methods.md").read_text("utf-8")
    told = re.findall(r"^\| `([a-z][\w-]*)` \|.*?\| (\d+) \| ", text, re.MULTILINE)
    assert {name for name, _ in told} == set(PRESETS) - {"quickstart"}
    for name, work in told:
        preset = PRESETS[name]
        assert work_per_image(preset, preset.epochs - 1) == int(work), name
    for flag, work in re.findall(r"^\| `(--attack [\w-]+)` \|[^|]*\| (\d+)", text, re.MULTILINE):
        config = dataclasses.replace(FLAGS[flag], replays=1)
        assert work_per_image(config, config.epochs - 1) == int(work), flag


def test_the_work_of_a_training_is_that_of_its_epochs() -> None:
    config = dataclasses.replace(Config(), steps=5, epochs=10, milestones=(7, 9), awp=0.01)
    assert work_of_training(config) == 10 * 16
    late = dataclasses.replace(config, awp_from=7)
    assert [work_per_image(late, epoch) for epoch in (0, 6, 7, 9)] == [13, 13, 16, 16]
    assert work_of_training(late) == 7 * 13 + 3 * 16
    cheap = dataclasses.replace(late, attack_from=4)
    assert [work_per_image(cheap, epoch) for epoch in (0, 3, 4, 9)] == [5, 5, 13, 16]
    assert work_of_training(cheap) == 4 * 5 + 3 * 13 + 3 * 16
    assert work_of_training(late, 8) == 2 * 16 and work_of_training(late, 10) == 0

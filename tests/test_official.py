"""The official code, for which a made clone stands: what it is given, and what is no clone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import bench_epoch
from bench.ladder import COUNTS, Ladder
from bench.official import Official, load_official
from reat_fast.config import Config

CPU = torch.device("cpu")


def made_clone(folder: Path) -> Path:
    """Write what stands for a clone of the official code."""
    lines = {
        "loss_functions": "def REAT(model, x, y, optimizer, counts, at_counts, args):\n"
        "    logits = model(x)\n"
        "    return logits, logits.square().sum() * args.eps + args.ns * args.ss\n",
        "resnet": "import torch\ndef resnet18(dataset):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))\n",
        "wrn": "WideResNet = None\n",
    }
    for name, text in lines.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_a_folder_that_is_no_clone_is_named(tmp_path: Path) -> None:
    made_clone(tmp_path)
    assert set(load_official(tmp_path)) == {"loss_functions", "resnet", "wrn"}
    with pytest.raises(ValueError, match="runs on a CUDA device only"):
        Official(tmp_path, "resnet18", COUNTS, Config(), CPU)
    (tmp_path / "wrn.py").write_text("wide = 1\n")
    with pytest.raises(ValueError, match=r"wrn.py has no WideResNet; is it REAT's\?"):
        load_official(tmp_path)
    (tmp_path / "wrn.py").write_text("import no_such_package\n")
    with pytest.raises(ValueError, match=r"wrn.py cannot be run \(No module named"):
        load_official(tmp_path)


def test_the_official_step_does_what_its_script_does(tmp_path: Path) -> None:
    device: Any = SimpleNamespace(type="cuda")  # passes for one until a tensor goes there
    made = made_clone(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "to", lambda self, *_: self)
        patch.setattr(Tensor, "to", lambda self, *_: self)
        official = Official(made, "resnet18", COUNTS, Config(), device)
        with pytest.raises(ValueError, match="has resnet18 and wrn28_10, not resnet8"):
            Official(made, "resnet8", COUNTS, Config(), device)
        images, labels = torch.rand(6, 3, 8, 8), torch.arange(6)
        deterministic = torch.backends.cudnn.deterministic
        before = [parameter.detach().clone() for parameter in official._model.parameters()]
        official.step(images, labels)
        assert sum(official._predicted) == 6 and sum(official._wrong) <= 6
        after = official._model.parameters()
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert 0 <= official.evaluate(images, labels) <= 6
        assert torch.backends.cudnn.deterministic == deterministic


def test_the_official_code_gets_images_as_its_loader_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[tuple[Tensor, Tensor]] = []

    def note(images: Tensor, labels: Tensor) -> None:
        given.append((images, labels))

    official: Any = SimpleNamespace(step=note, evaluate=note, device=CPU)
    monkeypatch.setattr("bench.ladder.Official", lambda *_: official)
    ladder = Ladder(CPU, batch_size=4, size=8, official=Path("clone"))
    note(*ladder._on_host)
    options = bench_epoch.Options(largest=50, test_images=7, batch_size=4)
    sets = bench_epoch._made(options)
    figures = bench_epoch._theirs(options, sets, official)
    for images, labels in given:
        assert images.dtype == torch.float32 and images.is_contiguous()
        assert len(images) == len(labels) and 0 <= images.min() < images.max() <= 1
    assert torch.equal(255 * given[0][0], ladder.batch.images.permute(0, 3, 1, 2).float())
    assert torch.equal(torch.cat([labels for _, labels in given[-2:]]), torch.arange(7))
    assert [figure.what.split(", ")[1] for figure in figures][2] == "with evaluation"
    assert figures[2].value == figures[0].value + figures[1].value

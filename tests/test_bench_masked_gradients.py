"""Masked input gradients in one kernel, with a stand-in for cuDNN that computes on a CPU."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import bench_masked_gradients as bench
from bench.traced import Convolution
from reat_fast.cli.command import run_command

OPTIONS = bench.Options(batch_size=2, calls=1, repeats=3, seconds=math.inf)


class Node:
    """What a graph of the stand-in computes with: a function of the tensors it is given."""

    def __init__(self, compute: Any) -> None:
        self.compute = compute

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self


class Graph:
    """A graph with five plans: the second cannot be built, the third is wrong."""

    last: Graph

    def __init__(self, **_: Any) -> None:
        self.asked: dict[str, Any] = {}
        self.ran: list[int] = []
        Graph.last = self

    def __getattr__(self, name: str) -> Any:  # what is of no matter here
        return lambda *_: None

    def tensor(self, **_: Any) -> Node:
        node = Node(lambda given: given[node])
        return node

    def conv_dgrad(self, *, loss: Node, filter: Node, **pairs: list[int]) -> Node:
        self.asked = pairs

        def compute(given: dict[Node, Tensor]) -> Tensor:
            output, weights = loss.compute(given).float(), filter.compute(given).float()
            size = [len(output), weights.shape[1], *given[self.relu].shape[2:]]
            return nn.grad.conv2d_input(size, weights, output, pairs["stride"], pairs["padding"])

        return Node(compute)

    def add(self, *, a: Node, b: Node) -> Node:
        return Node(lambda given: a.compute(given) + b.compute(given))

    def relu_backward(self, *, loss: Node, input: Node) -> Node:
        self.relu = input
        self.masked = Node(lambda given: loss.compute(given) * (input.compute(given) > 0))
        return self.masked

    def get_execution_plan_count(self) -> int:
        return 5

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        return 0

    def build_plan_at_index(self, index: int) -> None:
        if index == 1:
            raise RuntimeError("no kernel for this\nand more")

    def execute_plan_at_index(self, given: Any, workspace: Any, index: int, handle: Any) -> None:
        self.ran.append(index)
        given[self.masked].copy_(self.masked.compute(given) * (1.1 if index == 2 else 1))


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    names = SimpleNamespace(BFLOAT16=1, FLOAT=2, A=3, FALLBACK=4)
    made = SimpleNamespace(
        pygraph=Graph, data_type=names, heur_mode=names, set_stream=lambda **_: None
    )
    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return made, "handle"


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_separate_form_is_what_autograd_computes(stride: int, readers: int) -> None:
    case = bench.Case.of(Convolution(4, 6, 3, stride, 1, 1, 8), 2, torch.device("cpu"))
    before = case.relu.double().requires_grad_()
    output = nn.functional.conv2d(before.relu(), case.weights.double(), None, stride, 1)
    loss = (output * case.out_gradient).sum() + (readers - 1) * (before.relu() * case.other).sum()
    (expected,) = torch.autograd.grad(loss, before)
    found = case.separate(readers).double()
    assert (found - expected).norm() <= 1e-2 * expected.norm()  # bfloat16
    assert torch.equal(found == 0, (case.relu == 0) | (found == 0))
    assert not torch.equal(found != 0, case.bare() != 0)


@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_only_plans_that_compute_the_same_are_timed(
    stride: int, readers: int, library: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    case = bench.Case.of(Convolution(4, 6, 3, stride, 1, 1, 8), 2, torch.device("cpu"))
    figures = bench._row(case, 3, readers, OPTIONS, library, math.inf)
    assert Graph.last.asked == {"padding": [1, 1], "stride": [stride] * 2, "dilation": [1, 1]}
    whats = [figure.what.removeprefix("input gradient: ") for figure in figures]
    assert whats == ["bare", "and pass", "one kernel"]
    assert f"3 times, {readers} readers" in figures[0].shape
    shown = capsys.readouterr().out
    assert re.search(r"3 of 5 tried, 5 there plan 2 is off by (9\.\de-02|1\.0e-01), allowed", shown)
    assert Graph.last.ran.count(2) == 1 and 1 not in Graph.last.ran
    assert all(Graph.last.ran.count(index) > 1 for index in (0, 3, 4))


def test_what_cudnn_refuses_is_told(
    library: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(self: Graph) -> None:
        raise RuntimeError("No valid engine configs\nat line 7")

    case = bench.Case.of(Convolution(4, 6, 3, 1, 1, 1, 8), 2, torch.device("cpu"))
    bench._row(case, 1, 1, OPTIONS, library, 0.0)  # no time for any plan
    assert "none  0 of 0 tried, 5 there time is up" in capsys.readouterr().out
    monkeypatch.setattr(Graph, "validate", refused, raising=False)
    figures = bench._row(case, 1, 1, OPTIONS, library, math.inf)
    assert len(figures) == 2
    assert "none  no graph: No valid engine configs\n" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench.main, ["--device", "cpu"]) == 2
    assert "no CUDA device was found" in capsys.readouterr().err
    assert run_command(bench.main, ["--plans", "0"]) == 2
    assert "--plans 0: must be at least 1" in capsys.readouterr().err

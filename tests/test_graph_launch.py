"""What launching the graph of a step costs the host: the parts of the command that need no GPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import graph_launch
from reat_fast.cli.command import run_command


def test_without_a_cuda_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(graph_launch.main, ["--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: --device cpu: only a CUDA device has graphs\n"


def test_what_a_graph_writes_to_lives_while_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive: list[bool] = []

    def small(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
        x = torch.zeros(3)
        written = weakref.ref(x)
        yield "graph of x", lambda: alive.append(written() is not None)
        x.add_(1)

    def timed(call: Callable[[], object], repeats: int) -> list[float]:
        call()
        return [1e-6] * repeats

    monkeypatch.setattr(graph_launch, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(graph_launch, "_small_graphs", small)
    monkeypatch.setattr(graph_launch, "_step", lambda name, device: SimpleNamespace())
    monkeypatch.setattr(graph_launch, "_parts", lambda step, name: iter(()))
    monkeypatch.setattr(graph_launch, "host_seconds", timed)
    assert run_command(graph_launch.main, ["--rung", "captured, cudnn"]) == 0
    assert alive == [True] and "graph of x" in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["", "cudaGraphInstantiate", "cudaGraphLaunch"])
def test_a_graph_is_made_without_flags_and_launched(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, list[Any]]] = []

    class Runtime:
        def __getattr__(self, name: str) -> Callable[..., int]:
            def call(*given: Any) -> int:
                called.append((name, [getattr(one, "value", None) for one in given]))
                return 700 * (name == failing)

            return call

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(graph_launch.ctypes, "CDLL", {"libcudart.so.13": Runtime()}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    graph = SimpleNamespace(raw_cuda_graph=lambda: 5)
    with pytest.raises(RuntimeError, match=f"{failing} .* 700") if failing else nullcontext():
        graph_launch.launch_without_flags(graph)()  # type: ignore[arg-type]
        assert [name for name, _ in called] == [
            *("cudaGraphInstantiate", "cudaGraphUpload", "cudaGraphLaunch"),
        ]
        assert called[0][1][1:] == [5, 0] and called[2][1][1] == 7


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Memset (Device)", "fills"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("_linf_step_kernel", "kernels"),
        ("void at::native::vectorized_elementwise_kernel<4, Memset>", "kernels"),
    ],
)
def test_what_a_graph_holds_is_told_apart_by_name(name: str, kind: str) -> None:
    assert graph_launch.kind_of(name) == kind

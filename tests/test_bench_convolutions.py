"""The table of convolutions: shapes as traced, work as counted, rows as they become known."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_convolutions, records
from bench.bench_convolutions import longest_kernel
from bench.records import Figure
from bench.traced import KINDS, Convolution, convolutions
from reat_fast.cli.command import run_command
from reat_fast.models import create_model

SMALL = ["--models", "resnet8", "--batch-sizes", "2", "--size", "8", "--device", "cpu"]
SMALL += ["--calls", "1", "--repeats", "2"]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect rows instead of appending them, and know the matrix product."""
    kept: list[Figure] = []
    monkeypatch.setattr(bench_convolutions, "record", lambda figures, *_: kept.extend(figures))
    monkeypatch.setattr(bench_convolutions, "matrix_rate", lambda device: 1e12)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    return kept


@pytest.mark.parametrize(
    ("model", "shapes", "layers"), [("resnet18", 11, 20), ("wrn28_10", 10, 28)]
)
def test_the_shapes_of_a_network_hold_all_its_work(model: str, shapes: int, layers: int) -> None:
    found = convolutions(model, 32)
    assert len(found) == shapes and found.total() == layers
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        create_model(model, 10).eval()(torch.zeros(1, 3, 32, 32))
    counted = counter.get_flop_counts()["Global"]
    expected = sum(value for name, value in counted.items() if "conv" in str(name))
    assert sum(count * shape.flops(1) for shape, count in found.items()) == expected
    assert next(iter(found)).name.startswith("3 to ")


@pytest.mark.parametrize("stride", [1, 2])
def test_each_kind_is_what_autograd_computes(stride: int) -> None:
    torch.manual_seed(0)
    shape = Convolution(4, 6, 3, stride, 1, 1, 8)
    calls = shape.calls(2, torch.device("cpu"), torch.float32)
    assert tuple(calls) == KINDS
    found = {kind: call() for kind, call in calls.items()}
    torch.manual_seed(0)
    images = torch.randn(2, 4, 8, 8).requires_grad_()
    weights = torch.randn(6, 4, 3, 3).requires_grad_()
    output = F.conv2d(images, weights, stride=stride, padding=1)
    assert output.shape[2] == shape.out_size
    gradients = torch.autograd.grad(output, (images, weights), torch.randn(output.shape))
    for kind, expected in zip(KINDS, (output, *gradients), strict=True):
        # Sums of at most 128 products in another order, of numbers around 1.
        torch.testing.assert_close(found[kind], expected, rtol=1e-4, atol=1e-4)


def test_the_table_runs_on_a_cpu(rows: list[Figure], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench_convolutions.main, [*SMALL, "--shapes", "2"]) == 0
    assert rows == []
    assert run_command(bench_convolutions.main, [*SMALL, "--shapes", "2", "--keep"]) == 0
    shown = capsys.readouterr().out
    assert "all, an attack iteration" in shown and "resnet8, 2 images" in shown
    assert rows[0].what == "matrix product" and rows[0].value == 1
    assert [row.what for row in rows[1:]] == 2 * [f"convolution: {kind}" for kind in KINDS]
    assert all(row.repeats == 2 and row.value > 0 for row in rows[1:])
    assert rows[1].shape.startswith("resnet8 B=2 3 to ")
    assert run_command(bench_convolutions.main, [*SMALL, "--shapes", "0"]) == 2
    assert "--shapes 0: must be at least 1" in capsys.readouterr().err


def test_rows_that_are_known_stay_when_the_table_is_ended(
    rows: list[Figure], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        bench_convolutions, "record", lambda *given: records.record(*given, folder=tmp_path)
    )
    timed = bench_convolutions.timed_calls
    calls: list[Any] = []

    def ended_at_the_third(*given: Any) -> list[float]:
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return timed(*given)

    monkeypatch.setattr(bench_convolutions, "timed_calls", ended_at_the_third)
    assert run_command(bench_convolutions.main, [*SMALL, "--keep"]) == 143
    (file,) = tmp_path.glob("*.csv")
    assert len(file.read_text().splitlines()) == 1 + 1 + 2


def test_the_kernel_that_ran_longest_is_named() -> None:
    def event(name: str, microseconds: float, where: DeviceType = DeviceType.CUDA) -> Any:
        span = SimpleNamespace(elapsed_us=lambda: microseconds)
        return SimpleNamespace(name=name, device_type=where, time_range=span)

    convolution = event("void cudnn::Kernel<sm90_bf16_128x128>(cudnn::Params)", 20.0)
    others = [event("aten::convolution", 90.0, DeviceType.CPU), event("nchwToNhwc(float*)", 3.0)]
    assert longest_kernel([*others, convolution]) == "cudnn::Kernel<sm90_bf16_128x128> and 1 more"
    assert longest_kernel([convolution]) == "cudnn::Kernel<sm90_bf16_128x128>"
    assert longest_kernel(others[:1]) == ""

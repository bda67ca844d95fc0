"""The benchmark of our 3x3 convolutions: what it tries, keeps and refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from old_triton import interprets_no_loop

from bench import bench_conv3x3 as bench
from bench import conv3x3_works
from bench.records import Figure
from bench.traced import Convolution, convolutions
from reat_fast.cli.command import run_command
from reat_fast.kernels.boxes import Tile

SMALL = ["--device", "cpu", "--batch-size", "1", "--size", "4", "--shapes", "2"]
ONCE = ["--calls", "1", "--repeats", "1"]
CPU = torch.device("cpu")


@pytest.mark.interpreter
def test_the_fastest_right_tile_of_each_computation_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: list[Figure] = []
    monkeypatch.setattr(conv3x3_works, "CANDIDATES", (Tile(64, 64, 4), Tile(16, 64, 4)))
    monkeypatch.setattr(bench, "record", lambda figures, *_: kept.extend(figures))
    assert run_command(bench.main, [*SMALL, *ONCE, "--keep"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    names = ["forward", "gradient"]  # of the stem
    names += ["forward", "forward, sum", "gradient, mask", "gradient, sum, mask"]
    assert [line[35:55].strip() for line in lines] == names
    forms = [f"conv3x3: {name}, {form}" for name in names for form in ("cuDNN", "ours")]
    assert [figure.what for figure in kept] == forms
    tiles = [figure.shape.split(", ")[-1] for figure in kept[1::2]]
    assert tiles[0] == "stem" and {*tiles[1:]} <= {"64x64/4", "16x64/4"}


@pytest.mark.interpreter
def test_a_wrong_result_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def almost(*given: Any, **options: Any) -> torch.Tensor:
        return whole(*given, **options) * 1.02

    whole = conv3x3_works.ours.conv3x3
    monkeypatch.setattr(conv3x3_works, "CANDIDATES", (Tile(16, 64, 4),))
    monkeypatch.setattr(conv3x3_works.ours, "conv3x3", almost)
    assert run_command(bench.main, [*SMALL, *ONCE]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert ["none" in line and "off by 2." in line for line in lines] == [
        *(False, False),
        *(True, True, False, False),
    ]


@pytest.mark.interpreter
@interprets_no_loop
@pytest.mark.parametrize(("channels", "stride", "works"), [(32, 1, 4), (3, 1, 2), (64, 2, 2)])
def test_each_computation_is_the_librarys(channels: int, stride: int, works: int) -> None:
    torch.manual_seed(0)
    found = conv3x3_works.works(Convolution(channels, 64, 3, stride, 1, 1, 6), 2, CPU)
    assert len(found) == works
    for work in found:
        exact = work.exact()
        assert not any(name == "resident" for name in work.own)
        for call in (work.library, *list(work.own.values())[-2:]):
            assert conv3x3_works.distance(call(), exact) < 2.0**-8


@pytest.mark.parametrize("channels", [3, 64])
def test_the_librarys_gradient_makes_no_pass_that_an_attack_does_not(channels: int) -> None:
    case = conv3x3_works.Case(Convolution(channels, 64, 3, 1, 1, 1, 6), 2, CPU)
    relu = None if channels == 3 else case.relu
    work = case.gradient("gradient", relu, None)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        work.library()
    names = {event.name.removeprefix("aten::") for event in profiled.events() or []}
    assert "convolution_backward" in names and not names & {"constant_pad_nd", "pad", "clone"}


def test_an_error_without_words_is_a_note_by_its_name() -> None:
    def fails() -> torch.Tensor:
        raise AssertionError

    x = torch.ones(2)
    work = conv3x3_works.Work("forward", x.clone, {"tile": fails}, x.clone)
    assert bench._ours(work, lambda call: [0.0]) == ({}, ["tile: AssertionError"])


@pytest.mark.interpreter
def test_other_convolutions_are_left_out() -> None:
    taken = [shape for shape in convolutions("resnet18", 8) if conv3x3_works.works(shape, 1, CPU)]
    assert all(shape.kernel == 3 for shape in taken)
    assert [shape.in_width for shape in taken if shape.stride == 1] == [3, 64, 128, 256, 512]
    assert [shape.in_width for shape in taken if shape.stride == 2] == [64, 128, 256]


def test_where_the_kernels_cannot_run_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(bench.main, ["--device", "cpu"]) == 2
    assert "--device cpu: needs" in capsys.readouterr().err

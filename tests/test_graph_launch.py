"""What launching the graph of a step costs the host: the parts of the command that need no GPU."""

from __future__ import annotations

import pytest

from bench import graph_launch
from reat_fast.cli.command import run_command


def test_without_a_cuda_device_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(graph_launch.main, ["--device", "cpu"]) == 2
    assert capsys.readouterr().err == "error: --device cpu: only a CUDA device has graphs\n"


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

"""The verify command: every row holds here, and a broken op does not pass."""

from __future__ import annotations

import json
import math

import pytest
import torch
from old_triton import interprets_no_loop
from torch import Tensor

from reat_fast import verify
from reat_fast.cli.command import run_command
from reat_fast.parity import losses
from reat_fast.parity.rows import Row


def test_every_row_holds_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(verify.main, ["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"{len(lines) - 3} of {len(lines) - 3} rows hold"
    ops = {line.split("  ")[0] for line in lines[2:-1]}
    assert ops >= {"philox", "prepare", "linf_step", "l2_step", "class_loss", "tail_penalty"}
    assert ops >= {"affine_relu", "masked_sum", "policy", "pooled_linear"}
    assert ops >= {"rbl_weights", "folded network", "inertness", "training step"}
    assert any("double loop" in line for line in lines)


def test_a_broken_op_falls_short(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def almost(features: Tensor, *arguments: object, **options: object) -> Tensor:
        return whole(features, *arguments, **options) * (1 + 1e-5)  # type: ignore[arg-type]

    whole = losses.tail_penalty
    monkeypatch.setattr(losses, "tail_penalty", almost)
    monkeypatch.setattr(verify, "compare_steps", lambda device: iter(()))
    assert run_command(verify.main, ["--device", "cpu"]) == 1
    assert "FALLS SHORT" in capsys.readouterr().out
    assert run_command(verify.main, ["--device", "cpu", "--json"]) == 1
    assert not all(row["ok"] for row in json.loads(capsys.readouterr().out))


def test_what_the_interpreter_computes_wrongly_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("op", "case", name, 0.0, 1.0) for name in ("float32", "bfloat16", "float16")]
    monkeypatch.setattr(verify, "INTERPRETED", True)
    monkeypatch.setattr(verify, "compare_ops", lambda *_: iter(rows))
    monkeypatch.setattr(verify, "compare_steps", lambda device: iter(()))
    assert run_command(verify.main, ["--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "bfloat16 left out" in shown and shown.endswith("2 of 2 rows hold\n")


def test_an_error_that_is_not_a_number_does_not_hold() -> None:
    assert not Row("op", "case", "float32", math.nan, 1.0).ok


@pytest.mark.interpreter
@interprets_no_loop
def test_every_kernel_holds_in_the_interpreter() -> None:
    rows = list(verify.compare_ops(torch.device("cpu"), "triton"))
    assert len(rows) > 40 and all(row.ok for row in rows)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(verify.main, ["--device", "gpu"]) == 2
    assert "--device gpu: give auto, cpu, cuda or cuda:N" in capsys.readouterr().err

"""Which arithmetic is taken where, and that full precision is given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reat_fast.config import Config
from reat_fast.engine.precision import full_precision, resolve_precision, use_precision
from reat_fast.engine.step_attack import resolve_form
from reat_fast.evaluate import Options, _conditions


@pytest.mark.parametrize(
    ("precision", "fused", "device", "expected"),
    [
        ("auto", True, "cuda", "bf16"),
        ("auto", True, "cpu", "float32"),
        ("auto", False, "cuda", "float32"),
        ("tf32", True, "cuda", "tf32"),
        ("tf32", True, "cpu", "float32"),
        ("bf16", True, "cpu", "bf16"),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, precision: str, fused: bool, device: str, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    config = Config(precision=precision, fused=fused)  # type: ignore[arg-type]
    assert resolve_precision(config, torch.device(device)) == expected


def test_a_gpu_without_bfloat16_gets_float32_and_refuses_the_flag(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As cuDNN has no such convolution there: T4, RTX 20 and V100."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    cuda = torch.device("cuda")
    assert resolve_precision(Config(), cuda) == "float32"
    assert resolve_form(Config(), cuda) == "eager"
    with pytest.raises(ValueError, match="^--precision bf16: Tesla T4 does not .* float32$"):
        resolve_precision(Config(precision="bf16"), cuda)
    options = Options(Path("run"), precision="bf16")
    with pytest.raises(ValueError, match="^--precision bf16: Tesla T4 does not"):
        _conditions(options, Config(), cuda)


@pytest.fixture
def flags_as_found() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark)
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def test_full_precision_gives_the_flags_back(flags_as_found: None) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    use_precision(Config(precision="tf32"), torch.device("cuda"))
    assert cudnn.allow_tf32 and matmul.allow_tf32
    with pytest.raises(KeyError), full_precision():
        assert not cudnn.allow_tf32 and not matmul.allow_tf32
        raise KeyError
    assert cudnn.allow_tf32 and matmul.allow_tf32
    use_precision(Config(precision="float32"), torch.device("cpu"))
    assert not cudnn.allow_tf32 and not matmul.allow_tf32

"""Which arithmetic is taken where, and that full precision is given back as it was."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from reat_fast.config import Config
from reat_fast.engine.precision import full_precision, resolve_precision, use_precision


@pytest.mark.parametrize(
    ("precision", "fused", "device", "expected"),
    [
        ("auto", True, "cuda", "bf16"),
        ("auto", True, "cpu", "float32"),
        ("auto", False, "cuda", "float32"),
        ("tf32", True, "cuda", "tf32"),
        ("bf16", True, "cpu", "bf16"),
    ],
)
def test_auto_is_bfloat16_on_a_gpu_alone(
    precision: str, fused: bool, device: str, expected: str
) -> None:
    config = Config(precision=precision, fused=fused)  # type: ignore[arg-type]
    assert resolve_precision(config, torch.device(device)) == expected


@pytest.fixture
def flags_as_found() -> Iterator[None]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark)
    yield
    cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before


def test_full_precision_gives_the_flags_back(flags_as_found: None) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    use_precision(Config(precision="tf32"), torch.device("cpu"))
    assert cudnn.allow_tf32 and matmul.allow_tf32
    with pytest.raises(KeyError), full_precision():
        assert not cudnn.allow_tf32 and not matmul.allow_tf32
        raise KeyError
    assert cudnn.allow_tf32 and matmul.allow_tf32
    use_precision(Config(precision="float32"), torch.device("cpu"))
    assert not cudnn.allow_tf32 and not matmul.allow_tf32

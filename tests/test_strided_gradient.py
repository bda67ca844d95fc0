"""The gradient of a block's input where images are halved, against float64 and autograd."""

from __future__ import annotations

import pytest
import torch
from old_triton import interprets_no_loop
from test_conv3x3 import double, laid_out
from torch import Tensor
from torch.nn import functional as F

from reat_fast.kernels import strided_gradient as module
from reat_fast.kernels.boxes import Tile, largest_tile
from reat_fast.kernels.strided_gradient import (
    TILES,
    strided_gradient,
    strided_gradient_runs_on,
    strided_gradient_torch,
)

pytestmark = interprets_no_loop

SHAPES = [  # batch, channels in and out, height and width of x
    (2, 64, 128, 16, 16),
    (3, 128, 64, 6, 10),
    (1, 64, 64, 2, 2),
    (9, 64, 128, 8, 8),
]


class Drawn:
    """What a strided convolution and one beside it send back, and what x looks like."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str, integers: bool = False
    ) -> None:
        batch, channels, outputs, height, width = shape
        torch.manual_seed(sum(shape))

        def made(*size: int) -> Tensor:
            values = torch.randint(-1, 2, size) if integers else torch.randn(size)
            return laid_out(values, dtype, device)

        scale = 1 if integers else (4 * outputs) ** 0.5
        self.masked, self.beside = (made(batch, outputs, height // 2, width // 2) for _ in range(2))
        self.weight = made(outputs, channels, 3, 3) / scale
        self.shortcut = self.beside, made(outputs, channels, 1, 1) / scale
        self.x, self.other = (made(batch, channels, height, width) for _ in range(2))
        self.relu = self.x.relu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_float64_rounded_once(
    device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    drawn = Drawn(shape, dtype, device)
    found = strided_gradient(drawn.masked, drawn.weight, drawn.relu, drawn.other, drawn.shortcut)
    given = double(drawn.masked, drawn.weight, drawn.relu, drawn.other)
    shortcut = drawn.beside.double(), drawn.shortcut[1].double()
    wanted = strided_gradient_torch(*given, shortcut)  # type: ignore[arg-type]
    assert found.is_contiguous(memory_format=torch.channels_last)
    # One rounding to the dtype of a sum of float32, of numbers that come to be about 1.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("parts", range(8))
def test_sums_of_integers_are_exact_with_any_of_the_operands(device: str, parts: int) -> None:
    drawn = Drawn((3, 64, 64, 8, 12), torch.float16, device, integers=True)
    drawn.relu[0, 5, 0, 0], drawn.relu[0, 5, 0, 1] = torch.nan, -0.0
    relu = drawn.relu if parts & 1 else None
    other = drawn.other if parts & 2 else None
    shortcut = drawn.shortcut if parts & 4 else None
    found = strided_gradient(drawn.masked, drawn.weight, relu, other, shortcut)
    wide = (shortcut[0].double(), shortcut[1].double()) if shortcut else None
    given = double(drawn.masked, drawn.weight, relu, other)
    wanted = strided_gradient_torch(*given, wide)  # type: ignore[arg-type]
    assert torch.equal(found.double(), wanted)


@pytest.mark.parametrize("tile", TILES)
def test_every_tile_gives_exact_sums_of_integers(
    device: str, tile: Tile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILES", (tile,))
    drawn = Drawn((3, 128, 64, 8, 8), torch.float16, device, integers=True)
    given = (drawn.masked, drawn.weight, drawn.relu, drawn.other)
    shortcut = drawn.beside.double(), drawn.shortcut[1].double()
    wanted = strided_gradient_torch(*double(*given), shortcut)  # type: ignore[arg-type]
    assert torch.equal(strided_gradient(*given, drawn.shortcut).double(), wanted)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [  # of the three places in a ResNet-18, 128 images; and of a network of odd widths
        ((128, 128, 16, 16), (256, 64, 4)),
        ((128, 256, 8, 8), (256, 128, 8)),
        ((128, 512, 4, 4), (256, 64, 4)),
        ((8, 128, 4, 4), (128, 64, 4)),
    ],
)
def test_tiles_are_as_large_as_keeps_a_gpu_busy(
    shape: tuple[int, ...], tile: tuple[int, int, int]
) -> None:
    masked = torch.empty(shape, device="meta")
    assert largest_tile(TILES, masked, shape[1] // 2, module.KINDS)[:3] == tile


def test_it_is_the_gradient_of_autograd() -> None:
    drawn = Drawn((2, 4, 6, 8, 10), torch.float64, "cpu")
    x = drawn.x.clone().requires_grad_()
    reached = F.conv2d(x.relu(), drawn.weight, stride=2, padding=1)
    beside = F.conv2d(x.relu(), drawn.shortcut[1], stride=2)
    (wanted,) = torch.autograd.grad((reached, beside), x, (drawn.masked, drawn.beside))
    found = strided_gradient_torch(drawn.masked, drawn.weight, drawn.relu, None, drawn.shortcut)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_memory_around_the_tensors_is_neither_read_nor_written(device: str) -> None:
    shape = (3, 64, 64, 6, 6)
    plain, drawn = (Drawn(shape, torch.float16, device, integers=True) for _ in range(2))
    for name in ("masked", "weight", "relu", "other"):
        tensor = getattr(drawn, name)
        room = torch.full((tensor.numel() + 512,), torch.nan, dtype=tensor.dtype, device=device)
        middle = room.as_strided(tensor.shape, tensor.stride(), 256)
        setattr(drawn, name, middle.copy_(tensor))
    found, wanted = (
        strided_gradient(d.masked, d.weight, d.relu, d.other, plain.shortcut)
        for d in (drawn, plain)
    )
    assert torch.equal(found, wanted)


def test_what_the_kernel_does_not_take_is_known(device: str) -> None:
    good = Drawn((2, 64, 128, 8, 8), torch.bfloat16, device)
    assert strided_gradient_runs_on(good.masked, good.weight, good.x)
    for masked, weight, x in (
        (good.masked.float(), good.weight.float(), good.x.float()),
        (good.masked.half(), good.weight, good.x),
        (good.masked.contiguous(), good.weight, good.x),
        (good.masked, good.weight[:, :, :1, :1], good.x),
        (good.masked, good.weight[:, :32], good.x[:, :32]),
        (good.masked, good.weight, good.x[:, :, :7]),
        (good.masked[:0], good.weight, good.x[:0]),
    ):
        assert not strided_gradient_runs_on(masked, weight, x)


def test_what_lies_otherwise_is_copied_and_what_does_not_fit_is_named(device: str) -> None:
    drawn = Drawn((2, 64, 64, 4, 4), torch.float16, device, integers=True)
    wanted = strided_gradient(drawn.masked, drawn.weight, drawn.relu, drawn.other)
    turned = drawn.relu.contiguous(), drawn.other.contiguous()
    assert torch.equal(strided_gradient(drawn.masked, drawn.weight, *turned), wanted)
    with pytest.raises(ValueError, match=r"is torch.float16 \[2, 64, 1, 1\], the result"):
        strided_gradient(drawn.masked, drawn.weight, drawn.relu[:, :, :1, :1])

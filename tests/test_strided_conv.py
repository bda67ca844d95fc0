"""The forward of a block where images are halved, with the shortcut's, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from old_triton import interprets_no_loop
from test_conv3x3 import Case, double, laid_out
from torch import Tensor

from reat_fast.kernels import own_conv
from reat_fast.kernels.boxes import Tile, largest_tile
from reat_fast.kernels.fused_conv import conv_relu, conv_relu_linked
from reat_fast.kernels.strided_conv import (
    TILES,
    strided_conv,
    strided_conv_runs_on,
    strided_conv_torch,
)
from reat_fast.networks.frozen import FrozenNetwork

pytestmark = interprets_no_loop

SHAPES = [  # batch, channels in and out, height and width of x
    (2, 64, 128, 16, 16),
    (3, 128, 64, 6, 10),
    (1, 64, 64, 2, 2),
    (9, 64, 128, 8, 8),
    (2, 32, 40, 4, 22),
    (1, 96, 8, 2, 256),
]


class Drawn:
    """What a strided convolution and one beside it read."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str, integers: bool = False
    ) -> None:
        batch, channels, outputs, height, width = shape
        torch.manual_seed(sum(shape))

        def made(*size: int) -> Tensor:
            values = torch.randint(-1, 2, size) if integers else torch.randn(size)
            return laid_out(values, dtype, device)

        def scaled(weight: Tensor) -> Tensor:
            return weight if integers else weight / weight[0].numel() ** 0.5

        self.x, self.bias = made(batch, channels, height, width), made(outputs, 1, 1, 1).flatten()
        self.weight = scaled(made(outputs, channels, 3, 3))
        self.shortcut = scaled(made(outputs, channels, 1, 1))

    @property
    def given(self) -> tuple[Tensor, ...]:
        return self.x, self.weight, self.bias, self.shortcut


def exact(*given: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return strided_conv_torch(*double(*given))  # type: ignore[arg-type]


def same(found: tuple[Tensor, Tensor | None], wanted: tuple[Tensor, Tensor | None]) -> bool:
    """Say whether both outputs are equal, or both are None."""
    return all(
        one is other is None
        or (one is not None and other is not None and torch.equal(one.double(), other.double()))
        for one, other in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_are_float64_rounded_once(
    device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    drawn = Drawn(shape, dtype, device)
    # One rounding to the dtype of a sum of float32, of numbers that come to be about 1.
    eps = torch.finfo(dtype).eps
    for found, wanted in zip(strided_conv(*drawn.given), exact(*drawn.given), strict=True):
        assert found is not None and wanted is not None
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found.double(), wanted, rtol=eps, atol=1e-5)


@pytest.mark.parametrize("parts", range(4))
@pytest.mark.parametrize("shape", [(3, 64, 64, 8, 12), (2, 32, 24, 6, 6)])
def test_sums_of_integers_are_exact_with_any_of_the_operands(
    device: str, shape: tuple[int, ...], parts: int
) -> None:
    drawn = Drawn(shape, torch.float16, device, integers=True)
    bias = drawn.bias if parts & 1 else None
    shortcut = drawn.shortcut if parts & 2 else None
    given = (drawn.x, drawn.weight, bias, shortcut)
    assert same(strided_conv(*given), exact(*given))


@pytest.mark.parametrize("tile", [*TILES, Tile(64, 32, 4)])
def test_every_tile_gives_exact_sums_of_integers(device: str, tile: Tile) -> None:
    drawn = Drawn((3, 64, 96, 8, 16), torch.float16, device, integers=True)
    assert same(strided_conv(*drawn.given, tile=tile), exact(*drawn.given))


@pytest.mark.parametrize(
    ("shape", "tile"),
    [  # of the three places in a ResNet-18, 128 images; and of a network of odd widths
        ((128, 128, 16, 16), (256, 128, 8)),
        ((128, 256, 8, 8), (128, 128, 4)),
        ((128, 512, 4, 4), (128, 64, 4)),
        ((128, 320, 16, 16), (256, 64, 4)),
    ],
)
def test_tiles_are_as_large_as_keeps_a_gpu_busy(
    shape: tuple[int, ...], tile: tuple[int, int, int]
) -> None:
    assert largest_tile(TILES, torch.empty(shape, device="meta"), shape[1])[:3] == tile


def test_nan_passes_the_relu_and_reaches_the_pixels_that_read_it(device: str) -> None:
    drawn = Drawn((2, 64, 64, 6, 6), torch.float16, device, integers=True)
    drawn.weight.fill_(1)
    drawn.shortcut.fill_(1)
    drawn.x[1, 3, 3, 4] = torch.nan  # an odd row, that two rows of y read, and z none
    drawn.x[0, 5, 0, 2] = torch.nan  # even, that z reads, too
    output, beside = strided_conv(*drawn.given)
    near = torch.zeros(2, 64, 3, 3, dtype=torch.bool, device=device)
    near[1, :, 1:3, 2] = near[0, :, 0, 1] = True
    assert torch.equal(output.isnan(), near)
    near[1] = False
    assert beside is not None and torch.equal(beside.isnan(), near)


def test_memory_around_the_tensors_is_neither_read_nor_written(device: str) -> None:
    drawn = Drawn((3, 64, 64, 6, 6), torch.float16, device, integers=True)
    wanted = strided_conv(*drawn.given)
    moved = []
    for tensor in drawn.given:
        room = torch.full((tensor.numel() + 512,), torch.nan, dtype=tensor.dtype, device=device)
        moved.append(room.as_strided(tensor.shape, tensor.stride(), 256).copy_(tensor))
    assert same(strided_conv(*moved), wanted)
    assert same(
        strided_conv(*drawn.given[:2], torch.stack([drawn.bias] * 2, 1)[:, 0]),
        (
            wanted[0],
            None,
        ),
    )


def test_what_the_kernel_does_not_take_is_known(device: str) -> None:
    good = Drawn((2, 64, 128, 8, 8), torch.bfloat16, device)
    assert strided_conv_runs_on(good.x, good.weight)
    room = good.x.new_zeros(good.x.numel() + 1)
    wide = laid_out(torch.zeros(1, 64, 2, 258), torch.bfloat16, device)
    few, odd = (
        laid_out(torch.zeros(size), torch.bfloat16, device)
        for size in ((128, 48, 3, 3), (12, 64, 3, 3))
    )
    for x, weight in (
        (good.x.float(), good.weight.float()),
        (good.x.half(), good.weight),
        (good.x.contiguous(), good.weight),
        (good.x, good.weight.contiguous()),
        (room.as_strided(good.x.shape, good.x.stride(), 1), good.weight),
        (good.x, good.weight[:, :, :1, :1]),
        (laid_out(good.x[:, :48], torch.bfloat16, device), few),
        (good.x, few),
        (good.x, odd),
        (laid_out(good.x[:, :, :7], torch.bfloat16, device), good.weight),
        (laid_out(good.x[..., :7], torch.bfloat16, device), good.weight),
        (wide, good.weight),
        (good.x[:0], good.weight),
    ):
        assert not strided_conv_runs_on(x, weight)


class Calls:
    """Count the calls of a kernel of ours, and of those which computed a shortcut, too."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, shortcut: int) -> None:
        self.all = self.of_shortcuts = 0
        kernel = getattr(own_conv, name)

        def counted(*given: Any) -> Any:
            self.all += 1
            self.of_shortcuts += given[shortcut] is not None
            return kernel(*given)

        monkeypatch.setattr(own_conv, name, counted)


@pytest.mark.parametrize(
    ("stride", "size", "together"), [((2, 2), 1, True), ((2, 2), 3, False), ((1, 1), 1, False)]
)
def test_a_shortcut_is_computed_beside_it_or_by_the_library(
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    stride: tuple[int, int],
    size: int,
    together: bool,
) -> None:
    drawn = Drawn((2, 64, 64, 6, 8), torch.float16, device, integers=True)
    near = laid_out(drawn.weight[:, :, :size, :size], torch.float16, device)
    padding = (size // 2, size // 2)
    calls = Calls(monkeypatch, "strided_conv", 3)

    def both(*, backend: Any) -> list[Tensor]:
        x = drawn.x.clone().requires_grad_()
        found = conv_relu_linked(
            *(x, drawn.weight, drawn.bias, None, (2, 2), (1, 1)),
            shortcut=(near, (stride, padding, (1, 1), 1)),
            backend=backend,
        )
        gradient = torch.autograd.grad(found, x, [torch.ones_like(output) for output in found])
        return [tensor.detach() for tensor in (*found, *gradient)]

    own, library = both(backend="triton"), both(backend="torch")
    assert (calls.all, calls.of_shortcuts) == (1, int(together))
    for found, wanted in zip(own, library, strict=True):
        assert torch.equal(found, wanted)


def test_one_without_a_shortcut_is_computed_alone(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = Drawn((2, 64, 64, 6, 8), torch.float16, device, integers=True)
    calls = Calls(monkeypatch, "strided_conv", 3)
    given = (drawn.x, drawn.weight, drawn.bias, None, (2, 2), (1, 1))
    found = conv_relu(*given, backend="triton")
    assert torch.equal(found, conv_relu(*given)) and (calls.all, calls.of_shortcuts) == (1, 0)
    residual = torch.zeros_like(found)
    conv_relu(*given[:3], residual, *given[4:], backend="triton")
    assert calls.all == 1


def test_a_network_has_its_halving_block_computed_by_two_kernels(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(device)
    forward = Calls(monkeypatch, "strided_conv", 3)
    backward = Calls(monkeypatch, "strided_gradient", 4)
    own = case.gradient(FrozenNetwork(case.model, torch.bfloat16, "triton"))
    assert (forward.all, forward.of_shortcuts) == (backward.all, backward.of_shortcuts) == (1, 1)
    exact, library = (
        case.gradient(FrozenNetwork(case.model, dtype, form))  # type: ignore[arg-type]
        for form, dtype in (("eager", None), ("cudnn", torch.bfloat16))
    )
    # Both round every layer to bfloat16, and through ReLUs near zero one may be luckier.
    error, allowed = float((own - exact).norm()), float((library - exact).norm())
    assert 0 < error < 2 * allowed < 0.4 * float(exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(128, 64, 128, 32, 32), (128, 128, 256, 16, 16)])
def test_at_the_size_of_an_attack_a_gpu_gives_what_the_library_gives(
    shape: tuple[int, ...],
) -> None:
    drawn = Drawn(shape, torch.float16, "cuda", integers=True)
    wanted = strided_conv_torch(*(tensor.float() for tensor in drawn.given))
    # Sums of up to 1152 products of -1, 0 and 1 are exact in float16 as well.
    assert same(strided_conv(*drawn.given), wanted)

"""3x3 convolution with 16 multiplications where there were 36, for weights that are constant.

    y = A^T [(G w G^T) * (B^T x B)] A        each 4x4 tile of x gives a 2x2 tile of y

B and A hold 0, 1 and -1 only; * is, summed over input channels, 16 matrix products. On two cores of
one AMD EPYC that is hardly faster than oneDNN's convolution with 160 channels, but 1.3 to 2.2 times
with 256 to 640, on those of a newer one it is slower: see winograd_pays. It rounds more than
oneDNN does, by a few units of the last place of its terms' sum. The input gradient of a
convolution is a convolution too, by the same weights turned round. A form for CPUs: a GPU's matrix
units would round the transformed tiles to bfloat16.
Source: Lavin and Gray, CVPR 2016, F(2x2, 3x3).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reat_fast.kernels.maps import empty_channels_last

# Measured on two cores of an AMD EPYC; with fewer channels the gain drowns in noise.
LEAST_CHANNELS = 160
ZEN5 = 26  # the family that AMD numbers it by
TILES_AT_A_TIME = 512  # what lies between the transforms stays in the cache

_TURNED = (3, 1, 2, 0)  # where rows and columns of G w G^T go when w is turned by 180 degrees


class WinogradConv2d(nn.Conv2d):
    """Conv2d with kernel 3, stride 1, padding 1 and frozen weights; call refresh_ when they change.

    Made by use_winograd_. Images of which a tile would cover too little take PyTorch's convolution.
    """

    transformed: Tensor
    transformed_back: Tensor

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        covered = 4 * _tiles(height) * _tiles(width)
        if x.ndim != 4 or covered > 1.5 * height * width:
            return super().forward(x)
        output: Tensor = _Convolve.apply(  # type: ignore[no-untyped-call]
            x, self.transformed, self.transformed_back, self.bias
        )
        return output

    @torch.no_grad()
    def refresh_(self) -> None:
        """Take up the weights as they are now."""
        transform_weight_(self.transformed, self.weight)
        inputs, outputs = self.transformed.shape[1:]
        both = self.transformed.view(4, 4, inputs, outputs)
        turned = torch.tensor(_TURNED, device=both.device)
        both = both.index_select(0, turned).index_select(1, turned)
        self.transformed_back.copy_(both.view(16, inputs, outputs).transpose(1, 2))


@functools.cache
def winograd_pays() -> bool:
    """Say whether matrix products keep up with convolutions on this CPU.

    PyTorch's products are MKL's, which on AMD's CPUs use registers of 256 bits, its convolutions
    oneDNN's, which use 512 where there are any. Those are computed at once from Zen 5 on, where
    16 products took 1.2 to 1.7 times as long as the convolution of 36 (two cores, 64 to 640
    channels, bench/bench_cpu_convolutions.py); before, and elsewhere, both are as fast.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n", 1)[0].splitlines()
    except OSError:
        return True
    about = {name.strip(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    family = about.get("cpu family", "")
    newer = about.get("vendor_id") == "AuthenticAMD" and family.isdecimal() and int(family) >= ZEN5
    return not newer or "avx512f" not in about.get("flags", "")


def use_winograd_(network: nn.Module, least_channels: int | None = None) -> list[WinogradConv2d]:
    """Let the 3x3 convolutions of a frozen network that gain by it compute this way; return them.

    Parameters, names and results, to rounding, stay.
    Errors: ValueError for weights that ask for a gradient.
    """
    least = LEAST_CHANNELS if least_channels is None else least_channels
    changed = []
    for name, module in network.named_modules():
        own = "weight" in module._parameters  # and not made anew by a hook at each call
        if type(module) is not nn.Conv2d or not own or not _fits(module, least):
            continue
        if any(parameter.requires_grad for parameter in module.parameters()):
            raise ValueError(f"{name}: its weights ask for a gradient, which this form has not")
        inputs, outputs = module.in_channels, module.out_channels
        module.__class__ = WinogradConv2d
        for buffer, shape in (
            ("transformed", (16, inputs, outputs)),
            ("transformed_back", (16, outputs, inputs)),
        ):
            module.register_buffer(buffer, module.weight.new_empty(shape), persistent=False)
        assert isinstance(module, WinogradConv2d)
        module.refresh_()
        changed.append(module)
    return changed


def transform_weight_(out: Tensor, weight: Tensor) -> None:
    """Write G w G^T of weight [K, C, 3, 3] into out [16, C, K]."""
    g = weight.new_tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    products = weight.flatten(2).contiguous() @ torch.kron(g, g).T  # [K, C, 16]
    out.copy_(products.permute(2, 1, 0))


def winograd_conv(x: Tensor, transformed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the convolution of x [B, C, H, W], padded by 1, with weights of transform_weight_.

    transformed [16, C, K], bias [K]; the result [B, K, H, W] is channels_last. No gradient.
    """
    batch, channels, height, width = x.shape
    rows, columns = _tiles(height), _tiles(width)
    shape = batch, transformed.shape[2], 2 * rows, 2 * columns
    output = empty_channels_last(shape, x)
    by_pixel = output.permute(0, 2, 3, 1)
    step = max(1, min(batch, TILES_AT_A_TIME // (rows * columns)))
    padded = x.new_zeros(step, 2 * rows + 2, 2 * columns + 2, channels)
    half = x.new_empty(4, step, rows, 2 * columns + 2, channels)
    tiles = x.new_empty(4, 4, step, rows, columns, channels)
    products = x.new_empty(16, step * rows * columns, transformed.shape[2])
    sums = x.new_empty(2, 4, step, rows, columns, transformed.shape[2])
    images = x.permute(0, 2, 3, 1)
    for first in range(0, batch, step):
        number = min(step, batch - first)  # of a short last part the rest holds what was before
        padded[:number, 1 : height + 1, 1 : width + 1] = images[first : first + number]
        _transform_(half, [padded[:, k : k + 2 * rows : 2] for k in range(4)])
        _transform_(
            tiles.transpose(0, 1), [half[:, :, :, k : k + 2 * columns : 2] for k in range(4)]
        )
        torch.bmm(tiles.view(16, -1, channels), transformed, out=products)
        if bias is not None:
            products[5] += bias  # the one product that all four results of a tile hold once
        _gather_(sums, products.view(4, 4, step, rows, columns, -1))
        part = by_pixel[first : first + number].view(number, rows, 2, columns, 2, -1)
        _gather_(part.permute(4, 2, 0, 1, 3, 5), sums[:, :, :number].transpose(0, 1))
    # No view: networks may add to what a convolution gives in place.
    cut = output if shape[2:] == (height, width) else output[:, :, :height, :width]
    return cut.contiguous(memory_format=torch.channels_last)


def _transform_(out: Tensor, x: list[Tensor]) -> None:
    """Write B^T x, along one direction, of four neighbours of every tile."""
    torch.sub(x[0], x[2], out=out[0])
    torch.add(x[1], x[2], out=out[1])
    torch.sub(x[2], x[1], out=out[2])
    torch.sub(x[1], x[3], out=out[3])


def _gather_(out: Tensor, x: Tensor) -> None:
    """Write A^T x, along the first direction of x [4, ...], into out [2, ...]."""
    torch.add(x[1], x[2], out=out[0]).add_(x[0])
    torch.sub(x[1], x[2], out=out[1]).sub_(x[3])


def _tiles(size: int) -> int:
    return (size + 1) // 2


def _fits(conv: nn.Conv2d, least_channels: int) -> bool:
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    plain = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"
    return plain and min(conv.in_channels, conv.out_channels) >= least_channels


class _Convolve(torch.autograd.Function):
    """winograd_conv with the gradient of its input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, transformed: Tensor, transformed_back: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(transformed_back)
        return winograd_conv(x, transformed, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (transformed_back,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[0]
        return winograd_conv(gradient, transformed_back) if wanted else None, None, None, None

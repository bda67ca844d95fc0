"""The convolutions of a network as they meet its images, and their three computations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reat_fast.models import create_model

Kind = Literal["forward", "input gradient", "weight gradient"]
KINDS: tuple[Kind, ...] = ("forward", "input gradient", "weight gradient")


@dataclass(frozen=True)
class Convolution:
    """One shape of convolution: channels, square kernel, stride, padding, height of its input."""

    in_width: int
    out_width: int
    kernel: int
    stride: int
    padding: int
    groups: int
    size: int

    @property
    def out_size(self) -> int:
        """Height of the output."""
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def name(self) -> str:
        """Describe the shape in a few words."""
        stride = f" stride {self.stride}" if self.stride > 1 else ""
        kernel = f"{self.kernel}x{self.kernel}{stride}"
        return f"{self.in_width} to {self.out_width}, {kernel}, {self.size}x{self.size}"

    def flops(self, batch_size: int) -> float:
        """Count the operations of each kind, two for a product and its sum."""
        pixels = batch_size * self.out_size**2
        return 2.0 * pixels * self.out_width * self.in_width // self.groups * self.kernel**2

    def calls(
        self, batch_size: int, device: torch.device, dtype: torch.dtype
    ) -> dict[Kind, Callable[[], Any]]:
        """Return what computes each kind on random tensors, channels_last."""

        def made(*shape: int) -> Tensor:
            values = torch.randn(shape, device=device).to(dtype)
            return values.contiguous(memory_format=torch.channels_last)

        images = made(batch_size, self.in_width, self.size, self.size)
        weights = made(self.out_width, self.in_width // self.groups, self.kernel, self.kernel)
        gradient = made(batch_size, self.out_width, self.out_size, self.out_size)
        shape: list[Any] = [[self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0]]
        backward = partial(torch.ops.aten.convolution_backward, gradient, images, weights, None)
        return {
            "forward": lambda: torch.ops.aten.convolution(
                images, weights, None, *shape, self.groups
            ),
            "input gradient": lambda: backward(*shape, self.groups, [True, False, False])[0],
            "weight gradient": lambda: backward(*shape, self.groups, [False, True, False])[1],
        }


def convolutions(model: str, size: int) -> Counter[Convolution]:
    """Count the shapes that a network of reat_fast.models has for images of a size, in order.

    Errors: ValueError for a convolution that is not square.
    """
    network = create_model(model, 10).eval()
    found: Counter[Convolution] = Counter()

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Conv2d) and not isinstance(module.padding, str)
        height, width = inputs[0].shape[2:]
        pairs = (module.kernel_size, module.stride, module.padding, (height, width))
        if any(a != b for a, b in pairs) or module.dilation != (1, 1):
            raise ValueError(f"--models {model}: {module} is not square and plain")
        kernel, stride, padding, height = (a for a, _ in pairs)
        widths = module.in_channels, module.out_channels
        found[Convolution(*widths, kernel, stride, padding, module.groups, height)] += 1

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(note)
    with torch.no_grad():
        network(torch.zeros(1, 3, size, size))
    return found

"""The network as the attack sees it: constant weights, BatchNorm folded into the convolutions.

While an attack runs, weights and running statistics are constant, so a convolution followed by
BatchNorm in eval mode is one convolution with a bias. The copy has weights of its own that ask for
no gradient, hence no weight gradient can be computed by mistake, and they stay in the same memory,
hence a captured step may refresh them.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from reat_fast.networks import ConvBN, Network


class FrozenNetwork:
    """Compute a network's eval-mode logits with BatchNorm folded; refresh() takes up new weights.

    network: any network of reat_fast.models; it is read, never written. Calling the frozen one on
    images [B, C, H, W] in [0, 1] returns logits [B, K] that equal those of the network in eval mode
    up to rounding. A BatchNorm that does not follow a convolution stays as it is. dtype: that of
    convolutions and linear layers; weights are folded in their own precision and then rounded.
    """

    def __init__(self, network: Network, dtype: torch.dtype | None = None) -> None:
        self._copy = copy.deepcopy(network).eval().requires_grad_(False)
        self._folds = _fold_(network, self._copy)
        self._dtype = next(network.parameters()).dtype if dtype is None else dtype
        for module in self._copy.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.to(self._dtype)
        folded = {id(t) for conv, _ in self._folds for t in (conv.weight, conv.bias)}
        source = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        own = {**dict(self._copy.named_parameters()), **dict(self._copy.named_buffers())}
        kept = [name for name, tensor in own.items() if id(tensor) not in folded]
        self._kept_own = [own[name] for name in kept]
        self._kept_source = [source[name] for name in kept]
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Take up the weights and statistics that the network has now; may not sync."""
        torch._foreach_copy_(self._kept_own, [tensor.detach() for tensor in self._kept_source])
        for conv, unit in self._folds:
            bn = unit.bn
            assert bn.running_mean is not None and bn.running_var is not None
            assert conv.bias is not None
            scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
            conv.weight.copy_(unit.conv.weight * scale.view(-1, 1, 1, 1))
            conv.bias.copy_(bn.bias - bn.running_mean * scale)

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self._copy(images.to(self._dtype))
        return logits


def _fold_(source: nn.Module, target: nn.Module) -> list[tuple[nn.Conv2d, ConvBN]]:
    """Put one convolution with a bias in the place of each ConvBN of the copy."""
    folds = []
    for name, unit in source.named_children():
        if isinstance(unit, ConvBN):
            conv = unit.conv
            folded = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                conv.stride,  # type: ignore[arg-type]
                conv.padding,  # type: ignore[arg-type]
                device=conv.weight.device,
                dtype=conv.weight.dtype,
            ).requires_grad_(False)
            folded.weight.data = torch.empty_like(conv.weight)
            setattr(target, name, folded)
            folds.append((folded, unit))
        else:
            folds += _fold_(unit, getattr(target, name))
    return folds

"""RoBal's cosine classifier: the angle between features and class weights, and nothing else.

The head returns what is deployed: scaled cosines, less a share of the log prior, so that a saved
network is evaluated and attacked as it is. RoBal's training wants the plain cosines; `cosines`
gives them back. Scale and compensation are buffers: they travel with the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reat_fast.kernels.triton_support import in_loss_precision

WEIGHT_NORM_OFFSET = 0.03125
"""What RoBal's classifier adds to the norms of its weights; its gamma."""


class CosineHead(nn.Linear):
    """Compute s cos(features, w_k) - tau_p log pi_k, with cos = f w_k / (|f| (|w_k| + 1/32)).

    scale: s; compensation [K]: tau_p log pi_k, zero until `compensate_`. Takes features [B, D] and
    returns logits [B, K]. Source: CosPlus_Classifier and PostProc_Classifier of RoBal (CVPR 2021).
    Kept: the offset of the weight norms. Dropped: the average of features that it keeps and does
    not use, and 0/0 where all features of an image are zero.
    """

    scale: Tensor
    compensation: Tensor

    def __init__(self, in_features: int, out_features: int, scale: float = 10.0) -> None:
        super().__init__(in_features, out_features, bias=False)
        if scale <= 0:
            raise ValueError(f"--head-scale {scale:g}: must be above 0; RoBal takes 10")
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("compensation", torch.zeros(out_features))

    def reset_parameters(self) -> None:
        """Draw the weights from U(-1/sqrt(D), 1/sqrt(D)), as the official code does."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, features: Tensor) -> Tensor:
        norms = self.weight.norm(dim=1, keepdim=True) + WEIGHT_NORM_OFFSET
        cosines = F.linear(F.normalize(features), self.weight / norms)
        return self.scale * cosines - self.compensation

    def cosines(self, logits: Tensor) -> Tensor:
        """Return the cosines [B, K] behind logits of this head, in float32 or float64."""
        return (in_loss_precision(logits) + self.compensation) / self.scale

    @torch.no_grad()
    def compensate_(self, counts: Sequence[int], tau: float) -> None:
        """Subtract tau log(n_k / N) from the logits from now on; counts below 1 are taken as 1."""
        sizes = torch.tensor(counts, dtype=torch.float64).clamp(min=1)
        self.compensation.copy_(tau * (sizes / sizes.sum()).log())


def use_cosine_head(network: nn.Module, scale: float = 10.0) -> CosineHead:
    """Put a fresh cosine classifier in the place of a network's last linear layer; return it.

    Works for every network of reat_fast.models, timm's too. Do it before the optimiser is made.
    """
    linear = cast("nn.Linear", network.fc)
    (name,) = [name for name, module in network.named_modules() if module is linear]
    head = CosineHead(linear.in_features, linear.out_features, scale)
    network.set_submodule(name, head.to(linear.weight))
    return head

"""What adversarial training on long-tailed data minimises, and the class statistics it needs.

The four functions are the terms of REAT (arXiv 2307.10205) on top of the ops in reat_fast.kernels;
ClassStatistics keeps what they know about classes on the device, so that a step never asks the
host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.class_weights import rbl_weights, refuse_shares
from reat_fast.kernels.tail_penalty import tail_penalty
from reat_fast.kernels.triton_support import Backend
from reat_fast.sources.longtail import by_falling_size

__all__ = [
    "ClassStatistics",
    "balanced_softmax_loss",
    "rbl_loss",
    "rbl_weights",
    "tail_penalty",
]


def rbl_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | Sequence[float],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Average the cross-entropy with per-class weights: sum_b w_yb CE_b / sum_b w_yb.

    logits [B, C], labels int64 [B], weights float32 [C] (rbl_weights). Returns a scalar.
    Source: RBL of the official REAT code; method section of arXiv 2307.10205.
    """
    weights = torch.as_tensor(weights, device=logits.device)
    return class_loss(logits, labels, weights=weights, backend=backend)


def balanced_softmax_loss(
    logits: Tensor,
    labels: Tensor,
    counts: Tensor | Sequence[int],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Average the cross-entropy of logits + log(counts).

    logits [B, C], labels int64 [B], counts: training images per class [C], below 1 taken as 1.
    Returns a scalar. Errors: ValueError for shares in place of counts, and for arguments of another
    shape or type. Source: balanced softmax (Ren et al., NeurIPS 2020), as BSL of the official
    REAT code.
    """
    refuse_shares(counts)
    if len(counts) != logits.shape[-1]:
        raise ValueError(f"counts: {len(counts)} of them; give one for each class of the logits")
    offsets = log_counts(torch.as_tensor(counts, device=logits.device), logits.dtype)
    return class_loss(logits, labels, offsets=offsets, backend=backend)


def log_counts(counts: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return log(counts) [C], counts below 1 taken as 1, in float32 or, if dtype is, float64."""
    precision = torch.promote_types(dtype, torch.float32)
    return counts.clamp(min=1).to(precision).log()


class ClassStatistics:
    """Class counts and the predictions of adversarial examples, all of it on the device.

    counts: training images per class. ae_counts: adversarial examples predicted per class in the
    last epoch, before the first one the counts. next_ae_counts: those of the running epoch.
    """

    def __init__(
        self,
        counts: Sequence[int],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        refuse_shares(counts)
        self.counts = torch.tensor(counts, dtype=torch.int64, device=device)
        order = by_falling_size(counts)
        self._order = torch.tensor(order, device=device)
        self._ranks = self._order.argsort()
        self._ordered = order == list(range(len(order)))
        self.log_counts = log_counts(self.counts, dtype)
        self.ae_counts = self.counts.clone()
        self.next_ae_counts = torch.zeros_like(self.counts)
        self.weights = rbl_weights(self.counts, self.ae_counts)

    def by_size(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Name the classes by their place from the largest to the smallest, as tail_penalty does.

        labels int64 [B]. Returns the labels and the counts [C] under those names.
        """
        if self._ordered:  # as in every subset drawn here
            return labels, self.counts
        return self._ranks[labels], self.counts[self._order]

    def end_epoch(self) -> None:
        """Renew the RBL weights from this epoch's predictions, in place and without a sync."""
        self.ae_counts.copy_(self.next_ae_counts)
        self.next_ae_counts.zero_()
        self.weights.copy_(rbl_weights(self.counts, self.ae_counts))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""
        return {"ae_counts": self.ae_counts, "next_ae_counts": self.next_ae_counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up a saved state, into the same memory."""
        self.ae_counts.copy_(state["ae_counts"])
        self.next_ae_counts.copy_(state["next_ae_counts"])
        self.weights.copy_(rbl_weights(self.counts, self.ae_counts))

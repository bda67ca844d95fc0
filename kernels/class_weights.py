"""REAT's class weights for its re-balancing loss, on the device of the counts.

With n_c training samples of class c, and a_c adversarial examples predicted as c in the last epoch,
    beta_c = (n_c - 1) / n_c
    E_c = (1 - beta_c^a_c) / (1 - beta_c) = -n_c expm1(a_c log1p(-1 / n_c))
    w_c = C (1 / (E_c + 1e-5)) / sum_k 1 / (E_k + 1e-5)
The last form of E keeps its digits where beta is close to 1. The published code forms 1 - beta from
a beta rounded to float32, which is off by up to n_c / 2^25 of itself: 1.5e-4 for n_c = 5000.

There is no Triton kernel: these are a dozen operators on C numbers once an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reat_fast.kernels.triton_support import Backend


def refuse_shares(counts: Tensor | Sequence[float]) -> None:
    """Raise ValueError for counts that are shares of a set, below 0 or NaN; waits for no device.

    So values of a tensor are looked at on a CPU alone, and those of integers are trusted.
    """
    if isinstance(counts, Tensor):
        if counts.device.type != "cpu" or not counts.is_floating_point():
            return
        counts = counts.flatten().tolist()
    sizes = list(counts)
    if not all(size >= 0 for size in sizes) or 0 < max(sizes, default=0) < 1:
        raise ValueError(
            f"counts: {str(sizes):.80}; give the number of training images of each class, "
            "of which shares are to be multiplied by that of the set"
        )


def rbl_weights(
    counts: Tensor | Sequence[int],
    ae_counts: Tensor | Sequence[int],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Compute each class's weight from its effective number of samples, without a sync.

    `counts` [C] training samples of each class, less than 1 taken as 1; `ae_counts` [C] adversarial
    examples predicted as each class, 0 or more; both on one device. Returns float32 [C] of mean 1,
    computed in float64. A class never predicted weighs 1e5 before the weights are scaled. Every
    `backend` runs the same operators. Raises ValueError for counts of another or unequal shape, and
    for shares in their place.
    Source: arXiv 2307.10205, function RBL of its published code.
    """
    refuse_shares(counts)
    counts, ae_counts = torch.as_tensor(counts), torch.as_tensor(ae_counts)
    if counts.ndim != 1 or len(counts) == 0 or ae_counts.shape != counts.shape:
        raise ValueError(
            f"counts and ae_counts must both have shape [C], got {list(counts.shape)} and "
            f"{list(ae_counts.shape)}"
        )
    samples = counts.double().clamp(min=1)
    predicted = ae_counts.double()
    log_beta = torch.log1p(-1 / samples)
    effective = -samples * torch.expm1(predicted * log_beta)
    # One sample: log beta is -inf, and beta^0 = 1 is 0 * -inf.
    effective = effective.masked_fill(predicted == 0, 0.0)
    inverse = 1 / (effective + 1e-5)
    return (inverse * (len(counts) / inverse.sum())).float()

"""The method in the plainest PyTorch: what every fast path is held against.

REAT (Re-balancing Adversarial Training, arXiv 2307.10205) as its official code computes it, in
float32 or float64, with loops where a loop is the obvious way to write it. Nothing here is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reat_fast.networks.architectures import Network

AttackLoss = Callable[[Tensor, Tensor], Tensor]


def rbl_weights(counts: Sequence[int], ae_counts: Sequence[int]) -> np.ndarray:
    """Weigh each class by how rarely adversarial examples were predicted as it.

    counts: training images per class [C]; ae_counts: adversarial examples predicted per class [C].
    Returns float32 [C], mean 1. Arithmetic in float32, class by class, as the official RBL.
    """
    effective = np.zeros(len(counts), dtype=np.float32)
    for c, (n, a) in enumerate(zip(counts, ae_counts, strict=True)):
        n = max(n, 1)  # a class without images: beta would divide by 0
        beta = np.float32((n - 1.0) / n)
        effective[c] = (1.0 - beta**a) / (1.0 - beta)
    weights = 1.0 / (effective + np.float32(1e-5))
    return np.asarray(weights / np.sum(weights) * len(counts), dtype=np.float32)


def rbl_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Average the cross-entropy with per-class weights: sum_b w_yb CE_b / sum_b w_yb."""
    return F.cross_entropy(logits, labels, weight=weights.to(logits))


def balanced_softmax_loss(logits: Tensor, labels: Tensor, counts: Sequence[int]) -> Tensor:
    """Average the cross-entropy of logits + log(counts); counts below 1 are taken as 1."""
    log_counts = torch.tensor([max(n, 1) for n in counts]).to(logits).log()
    return F.cross_entropy(logits + log_counts, labels)


def tail_classes(counts: Sequence[int]) -> list[int]:
    """Name the tail as the official code does: the classes after the first two thirds and one.

    The first is the largest there, so classes of one's own sets are taken by falling size.
    """
    by_size = sorted(range(len(counts)), key=lambda c: -counts[c])
    return by_size[len(counts) // 3 * 2 + 1 :]


def tail_penalty(
    features: Tensor, labels: Tensor, counts: Sequence[int], form: str = "official"
) -> Tensor:
    """Compare the features of tail samples with the whole batch by signed, weighted KL.

    features [B, D], labels [B], counts of the C training classes. Returns a scalar, 0 where the
    batch holds no tail class. Minimised as published, a pair of different classes is drawn
    together and a pair of one class apart. `official`: the product of two scalars per anchor that
    the official code computes, since its KLDivLoss(size_average='none') is a mean over all pairs
    and features. `pairwise`: a term per pair, KL summed over features, as its weights suggest.
    """
    batch, dim = features.shape
    sizes = torch.tensor([max(n, 1) for n in counts]).to(features)
    rarity = (1.0 / (sizes / sizes.sum())).sqrt()
    log_p = F.log_softmax(features, dim=1)
    anchors = [b for b in range(batch) if int(labels[b]) in tail_classes(counts)]
    total = features.new_zeros(())
    for i in anchors:
        p_i = F.softmax(features[i].detach(), dim=0)
        signs_and_weights, divergences = [], []
        for j in range(batch):
            sign = -1.0 if labels[i] == labels[j] else 1.0
            signs_and_weights.append(sign * (rarity[labels[i]] + rarity[labels[j]]))
            divergences.append(torch.xlogy(p_i, p_i).sum() - (p_i * log_p[j]).sum())
        pair_weights, pair_kl = torch.stack(signs_and_weights), torch.stack(divergences)
        if form == "official":
            total = total + pair_kl.sum() / (batch * dim) * pair_weights.mean()
        elif form == "pairwise":
            total = total + (pair_weights * pair_kl).mean()
        else:
            raise ValueError(f"tail form {form!r}: must be official or pairwise")
    return total / max(len(anchors), 1)


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    start: Tensor,
    loss: AttackLoss,
) -> Tensor:
    """Search an L-infinity ball for images that raise the loss, by signed gradient steps.

    images [B, C, H, W] in [0, 1]; start is added to them and not clamped before the first step, as
    in the official code. Returns images in [0, 1] within eps of the clean ones.
    """
    adv = images.detach() + start
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(adv), labels), adv)
        adv = adv.detach() + step_size * gradient.sign()
        adv = torch.min(torch.max(adv, images - eps), images + eps)
        adv = adv.clamp(0.0, 1.0)
    return adv.detach().clamp(0.0, 1.0)


def train_step(
    model: Network,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    counts: Sequence[int],
    ae_counts: Sequence[int],
    start: Tensor,
    eps: float,
    step_size: float,
    steps: int,
    tail: str = "official",
) -> dict[str, Tensor]:
    """Take one step of REAT: attack in eval mode, learn from the examples in train mode.

    Updates the model. Returns images_adv [B, C, H, W], logits [B, K] before the update, loss, bsl
    and tail (scalars, detached).
    """
    weights = torch.from_numpy(rbl_weights(counts, ae_counts)).to(images.device)

    def attacked(logits: Tensor, targets: Tensor) -> Tensor:
        return rbl_loss(logits, targets, weights)

    model.eval()
    images_adv = pgd(
        model,
        images,
        labels,
        eps=eps,
        step_size=step_size,
        steps=steps,
        start=start,
        loss=attacked,
    )
    model.train()
    optimizer.zero_grad()
    features, logits = model.forward_features_logits(images_adv)
    bsl = balanced_softmax_loss(logits, labels, counts)
    penalty = (
        bsl.new_zeros(()) if tail == "none" else tail_penalty(features, labels, counts, form=tail)
    )
    loss = bsl + penalty
    loss.backward()
    optimizer.step()
    outcome = {"images_adv": images_adv, "logits": logits, "loss": loss, "bsl": bsl}
    return {name: value.detach() for name, value in {**outcome, "tail": penalty}.items()}

"""How large the tail penalty's gradient is beside that of balanced softmax, measured."""

from __future__ import annotations

import torch
from torch import Tensor

from reat_fast.attack import pgd
from reat_fast.kernels.tail_penalty import Form
from reat_fast.networks.architectures import Network
from reat_fast.networks.borrowed import evaluating
from reat_fast.networks.frozen import FrozenNetwork
from reat_fast.objective import ClassStatistics, balanced_softmax_loss, tail_penalty


def tail_gradient_share(
    network: Network,
    images: Tensor,
    labels: Tensor,
    statistics: ClassStatistics,
    *,
    form: Form = "official",
    coefficient: float = 1.0,
    batch_size: int = 128,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
) -> float:
    """Return the norm of the penalty's gradient by the features over that of balanced softmax.

    images [N, C, H, W] in [0, 1] and labels int64 [N] are training images in random order, taken
    batch by batch, attacked by PGD from the clean images with BatchNorm in eval mode. statistics:
    those of the training set. The norms are means over the batches; one without tail classes
    has no penalty. The network is left as it was.
    """
    penalty = softmax = torch.zeros((), dtype=torch.float64, device=images.device)
    with evaluating(network):
        frozen = FrozenNetwork(network)
        for clean, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            adv = pgd(
                frozen,
                clean,
                y,
                eps=eps,
                step_size=step_size,
                steps=steps,
                start=torch.zeros_like(clean),
            )
            with torch.no_grad():
                features = network.forward_features(adv)
            features = features.detach().requires_grad_()
            loss = balanced_softmax_loss(network.fc(features), y, statistics.counts)
            ranks, sizes = statistics.by_size(y)
            tail = tail_penalty(features, ranks, sizes, form=form, coefficient=coefficient)
            softmax = softmax + torch.autograd.grad(loss, features)[0].norm().double()
            penalty = penalty + torch.autograd.grad(tail, features)[0].norm().double()
    return float(penalty / softmax)

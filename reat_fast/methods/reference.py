"""The methods of the field in the plainest PyTorch: what their fast forms are held against.

Each loss is written from its paper and its official code, in any precision, with loops where a loop
is the obvious way. Nothing here is fast, and nothing is shared with the fast forms but the network.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast import reference
from reat_fast.networks.architectures import Network

Loss = Callable[[Network], Tensor]


def kl(clean: Tensor, adv: Tensor) -> Tensor:
    """Compute KL(softmax clean || softmax adv) of each row of logits [B, K]; returns [B]."""
    rows = []
    for p, q in zip(clean.softmax(1), adv.softmax(1), strict=True):
        rows.append(sum((a * (a.log() - b.log()) for a, b in zip(p, q, strict=True)), p.sum() * 0))
    return torch.stack(rows)


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Average the cross-entropy to targets of which a share is spread over all classes."""
    targets = torch.full_like(logits, label_smoothing / logits.shape[1])
    for b, label in enumerate(labels.tolist()):
        targets[b, label] += 1 - label_smoothing
    return -(targets * logits.log_softmax(1)).sum() / len(logits)


def trades_loss(
    network: Network,
    clean: Tensor,
    adv: Tensor,
    labels: Tensor,
    beta: float = 6.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute CE(clean) + beta KL(clean || adv)."""
    clean_logits, adv_logits = network(clean), network(adv)
    ce = cross_entropy(clean_logits, labels, label_smoothing)
    return ce + beta * kl(clean_logits, adv_logits).mean()


def mart_loss(
    network: Network, clean: Tensor, adv: Tensor, labels: Tensor, beta: float = 5.0
) -> Tensor:
    """Compute the boosted CE(adv) and the KL of each image weighted by 1 - p_y(clean)."""
    clean_logits, adv_logits = network(clean), network(adv)
    terms = []
    for b, label in enumerate(labels.tolist()):
        p = adv_logits[b].softmax(0)
        likeliest_wrong = torch.cat([p[:label], p[label + 1 :]]).max()
        boosted = -p[label].log() - (1.0001 - likeliest_wrong).log()
        doubt = 1.0000001 - clean_logits[b].softmax(0)[label]
        terms.append(boosted + beta * doubt * kl(clean_logits[b : b + 1], adv_logits[b : b + 1])[0])
    return torch.stack(terms).mean()


def cosines(network: Network, images: Tensor) -> Tensor:
    """Compute the cosines [B, K] of RoBal's classifier from features and class weights."""
    features, _ = network.forward_features_logits(images)
    columns = []
    for weight in network.fc.weight:
        length = (weight * weight).sum().sqrt() + 0.03125
        lengths = (features * features).sum(1).sqrt()
        columns.append((features * weight).sum(1) / lengths / length)
    return torch.stack(columns, dim=1)


def robal_loss(
    network: Network,
    clean: Tensor,
    adv: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    *,
    beta: float = 6.0,
) -> Tensor:
    """Compute the cross-entropy with margins and prior on the AEs, and the KL of the cosines."""
    scale, margin, margin_tau, prior_tau = 10.0, 0.1, 0.3, 1.5
    clean_cosines, adv_cosines = cosines(network, clean), cosines(network, adv)
    rows = []
    for b, label in enumerate(labels.tolist()):
        shifted = []
        for k, count in enumerate(counts):
            cosine = adv_cosines[b, k]
            if k == label:
                cosine = cosine - margin - margin_tau / scale * math.log(count / min(counts))
            shifted.append(scale * cosine + prior_tau * math.log(count / sum(counts)))
        rows.append(-torch.stack(shifted).log_softmax(0)[label])
    return torch.stack(rows).mean() + beta * kl(clean_cosines, adv_cosines).mean()


def taet_loss(network: Network, clean: Tensor, adv: Tensor, labels: Tensor, epoch: int) -> Tensor:
    """Compute the cross-entropy of clean images, later the equalisation of the class losses."""
    if epoch < 40:
        return F.cross_entropy(network(clean), labels)
    logits = network(adv)
    by_class = []
    for c in range(logits.shape[1]):
        of_class = [b for b, label in enumerate(labels.tolist()) if label == c]
        loss = F.cross_entropy(logits[of_class], labels[of_class]) if of_class else logits.sum() * 0
        by_class.append(loss)
    mean = sum(by_class, logits.new_zeros(())) / len(by_class)
    total = mean * len(by_class)
    deviation = sum(((loss - mean) ** 2 for loss in by_class), mean * 0) / len(by_class)
    rare = sum(((loss / total) ** 2 for loss in by_class), mean * 0)
    return 0.1 * mean + 0.1 * deviation + 0.1 * rare


def class_radii(counts: Sequence[int], eps: float, alpha: float) -> list[float]:
    """Return RobustLT's radius of each class."""
    rarity = [math.sqrt(math.log(max(counts) / n)) for n in counts]
    mean = sum(n / sum(counts) * r for n, r in zip(counts, rarity, strict=True))
    return [eps * ((1 - alpha) + alpha * r / mean) for r in rarity]


def attack(
    network: Network,
    clean: Tensor,
    labels: Tensor,
    start: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    radii: Sequence[float],
    step_sizes: Sequence[float],
    steps: int,
    batchnorm: str = "eval",
) -> Tensor:
    """Attack image by image from `start`, each with a radius and step of its own.

    loss: of logits [B, K] and labels [B]. batchnorm: eval for running statistics, train for those
    of the attacked images, which move no running statistics: it is a copy that is attacked.
    Returns images in [0, 1].
    """
    victim = copy.deepcopy(network).train(batchnorm == "train")
    adv = start.clone()
    for _ in range(steps):
        adv = adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(victim(adv), labels), adv)
        moved = []
        for b, image in enumerate(adv.detach()):
            image = image + step_sizes[b] * gradient[b].sign()
            image = torch.min(torch.max(image, clean[b] - radii[b]), clean[b] + radii[b])
            moved.append(image.clamp(0.0, 1.0))
        adv = torch.stack(moved)
    return adv.detach().clamp(0.0, 1.0)


def trades_attack_loss(network: Network, clean: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return KL(clean || adv) as a loss of adversarial logits, the network in eval mode."""
    network.eval()
    clean_logits = network(clean).detach()
    return lambda logits, labels: kl(clean_logits, logits).sum()


def rbl_offsets_loss(logits: Tensor, labels: Tensor, weights: Sequence[float]) -> Tensor:
    """Compute the cross-entropy of logits + log w, w the RBL weight of each class."""
    offsets = [math.log(weight) for weight in weights]
    return F.cross_entropy(logits + logits.new_tensor(offsets), labels)


def one_step_attack(
    network: Network, clean: Tensor, labels: Tensor, noise: Tensor, *, step: float, radius: float
) -> Tensor:
    """Take FGSM's step from clean + noise in eval mode; radius inf leaves it where it ends.

    FGSM-RS: noise U(-eps, eps), step 1.25 eps, radius eps. N-FGSM: U(-2 eps, 2 eps), eps, inf.
    """
    network.eval()
    start = (clean + noise).clamp(0.0, 1.0).requires_grad_()
    loss = F.cross_entropy(network(start), labels)
    (gradient,) = torch.autograd.grad(loss, start)
    change = (start.detach() + step * gradient.sign() - clean).clamp(-radius, radius)
    return (clean + change).clamp(0.0, 1.0)


def awp_step(
    network: Network, optimizer: torch.optim.Optimizer, loss: Loss, gamma: float
) -> Tensor:
    """Take a step with adversarial weight perturbation; returns the loss at the moved weights.

    loss(network) -> scalar, in train mode. A copy of the network finds the perturbation.
    """
    proxy = copy.deepcopy(network)
    loss(proxy).backward()
    perturbations = []
    for (name, weight), other in zip(network.named_parameters(), proxy.parameters(), strict=True):
        gradient = other.grad
        stays = weight.ndim < 2 or "weight" not in name
        if gradient is None or stays or not gradient.any():
            perturbations.append(torch.zeros_like(weight))
        else:
            perturbations.append(gamma * weight.detach().norm() / gradient.norm() * gradient)
    with torch.no_grad():
        for weight, perturbation in zip(network.parameters(), perturbations, strict=True):
            weight.add_(perturbation)
    optimizer.zero_grad()
    value = loss(network)
    value.backward()
    optimizer.step()
    with torch.no_grad():
        for weight, perturbation in zip(network.parameters(), perturbations, strict=True):
            weight.sub_(perturbation)
    return value.detach()


def free_steps(
    network: Network,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    perturbation: Tensor,
    *,
    eps: float,
    replays: int,
) -> Tensor:
    """Train `replays` times on a batch by cross-entropy; returns the perturbation [B, C, H, W]."""
    for _ in range(replays):
        attacked = (images + perturbation).requires_grad_()
        optimizer.zero_grad()
        F.cross_entropy(network(attacked), labels).backward()
        assert attacked.grad is not None
        perturbation = (perturbation + eps * attacked.grad.sign()).clamp(-eps, eps)
        perturbation = (images + perturbation).clamp(0.0, 1.0) - images
        optimizer.step()
    return perturbation


def loss_of(
    objective: str,
    network: Network,
    clean: Tensor,
    adv: Tensor,
    labels: Tensor,
    counts: Sequence[int],
    epoch: int,
    beta: float,
    tail: str = "none",
    tail_coefficient: float = 1.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute a loss by the name that make_objective takes, bsl with REAT's tail penalty."""
    match objective:
        case "ce":
            return cross_entropy(network(adv), labels, label_smoothing)
        case "bsl":
            features, logits = network.forward_features_logits(adv)
            shifted = logits + torch.tensor([max(n, 1) for n in counts]).to(logits).log()
            loss = cross_entropy(shifted, labels, label_smoothing)
            if tail == "none":
                return loss
            return loss + tail_coefficient * reference.tail_penalty(features, labels, counts, tail)
        case "trades":
            return trades_loss(network, clean, adv, labels, beta, label_smoothing)
        case "mart":
            return mart_loss(network, clean, adv, labels, beta)
        case "robal":
            return robal_loss(network, clean, adv, labels, counts, beta=beta)
        case "taet":
            return taet_loss(network, clean, adv, labels, epoch)
    raise ValueError(f"objective {objective!r}: there is no reference of it")

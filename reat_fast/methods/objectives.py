"""What a step minimises, one function per method of the field, and make_objective to choose one.

All of them see a part of a batch, clean and adversarial, and return the logits of what they trained
on and their terms. A term is a sum over the part's rows divided by the images of the whole batch,
so that terms and gradients of parts and processes add up to those of one process on the whole
batch. Two kinds are not sums over rows: the tail penalty compares pairs, TAET takes class means.
They gather the rows of all processes, see Objective.whole; where one process computes a batch in
parts, they see one part at a time.

Nothing syncs, and no shape depends on data. What is said of the official code is tested against
reat_fast.methods.reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from reat_fast.config import Config
from reat_fast.kernels.class_loss import class_loss, count_
from reat_fast.kernels.tail_penalty import Form, tail_penalty
from reat_fast.kernels.triton_support import in_loss_precision
from reat_fast.methods.cosine_head import CosineHead
from reat_fast.networks.architectures import Network
from reat_fast.objective import ClassStatistics

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
Terms = dict[str, Tensor]

TAET_SHARE = 0.1
"""Weight of each of TAET's three terms, in the paper and in the official code."""


@dataclass(frozen=True)
class Part:
    """The rows of a batch that one process computes at once.

    clean, adv: images [B, C, H, W] in [0, 1]; labels int64 [B]; total: images of the whole batch,
    over all parts and processes; epoch: 0-dim int64 on the device; histogram: int64 [K], counted up
    by the predictions; gather: puts the rows of all processes one below the other (World.gather).
    """

    clean: Tensor
    adv: Tensor
    labels: Tensor
    total: int
    epoch: Tensor
    histogram: Tensor
    gather: Callable[[Tensor], Tensor] = lambda rows: rows


@dataclass(frozen=True)
class Objective:
    """A loss that is the sum of its terms.

    terms: their names; compute(forward, part) returns the logits [B, K] of the part's rows and the
    terms; whole: terms that every process computes of all rows, so their values must not be summed
    over processes, but their gradients are (they flow into each process's own rows).
    """

    terms: tuple[str, ...]
    compute: Callable[[Forward, Part], tuple[Tensor, Terms]]
    whole: frozenset[str] = frozenset()


def make_objective(network: Network, statistics: ClassStatistics, config: Config) -> Objective:
    """Choose the loss of a configuration and bind its constants; their meaning: see each function.

    Errors: ValueError for an unknown name, and for robal on a network without the cosine head.
    """
    smoothing = config.label_smoothing
    compute: Callable[..., tuple[Tensor, Terms]]
    match config.objective:
        case "ce":
            return Objective(("ce",), partial(cross_entropy, label_smoothing=smoothing))
        case "bsl":
            compute = partial(
                balanced_softmax,
                statistics=statistics,
                tail=config.tail,
                tail_coefficient=config.tail_coefficient,
                label_smoothing=smoothing,
            )
            return Objective(("bsl", "tail"), compute, frozenset({"tail"}))
        case "trades":
            compute = partial(trades, beta=config.beta, label_smoothing=smoothing)
            return Objective(("ce", "kl"), compute)
        case "mart":
            return Objective(("bce", "kl"), partial(mart, beta=config.beta))
        case "robal":
            return Objective(("margin", "kl"), _bound_robal(network, statistics, config))
        case "taet":
            compute = partial(taet, second_stage=config.second_stage)
            return Objective(("ce", "equal"), compute, frozenset({"ce", "equal"}))
    name = config.objective  # of a configuration that no command line made
    raise ValueError(f"--objective {name}: is unknown; give ce, bsl, trades, mart, robal or taet")


def cross_entropy(forward: Forward, part: Part, *, label_smoothing: float) -> tuple[Tensor, Terms]:
    """Compute CE(adv): plain adversarial training. Source: Madry et al., ICLR 2018."""
    _, logits = forward(part.adv)
    return logits, {"ce": _class_loss_term(logits, part, label_smoothing=label_smoothing)}


def balanced_softmax(
    forward: Forward,
    part: Part,
    *,
    statistics: ClassStatistics,
    tail: Form | Literal["none"],
    tail_coefficient: float,
    label_smoothing: float,
) -> tuple[Tensor, Terms]:
    """Compute CE(adv + log n_c) and REAT's tail penalty on the features.

    Source: at_bsl_loss.py of AT-BSL (CVPR 2024), without a penalty; loss_functions.py of REAT.
    """
    features, logits = forward(part.adv)
    bsl = _class_loss_term(
        logits, part, offsets=statistics.log_counts, label_smoothing=label_smoothing
    )
    if tail == "none":
        return logits, {"bsl": bsl, "tail": bsl.new_zeros(())}
    features = part.gather(features)
    labels, counts = statistics.by_size(part.gather(part.labels))
    penalty = tail_penalty(features, labels, counts, form=tail, coefficient=tail_coefficient)
    return logits, {"bsl": bsl, "tail": penalty * (len(labels) / part.total)}


def trades(
    forward: Forward, part: Part, *, beta: float, label_smoothing: float
) -> tuple[Tensor, Terms]:
    """Compute CE(clean) + beta KL(clean || adv), the gradient flowing into both.

    Source: trades.py of TRADES (ICML 2019). Dropped: its second forward of the clean images, which
    gives the same logits and moves the running statistics of BatchNorm once more, as the last.
    """
    clean, logits = _clean_and_adv(forward, part)
    ce = class_loss(clean, part.labels, label_smoothing=label_smoothing, reduction="sum")
    return logits, {"ce": ce / part.total, "kl": beta * kl_rows(clean, logits).sum() / part.total}


def mart(forward: Forward, part: Part, *, beta: float) -> tuple[Tensor, Terms]:
    """Compute BCE(adv) + beta (1 - p_y(clean)) KL(clean || adv).

    BCE = CE(adv) - log(1 - max_{k != y} p_k(adv)). Source: mart.py of MART (ICLR 2020). Kept: its
    1.0001 and 1.0000001 in the place of the ones, which bound the logarithm; dropped: 1e-12 in
    logarithms that log_softmax takes whole.
    """
    clean, logits = _clean_and_adv(forward, part)
    clean, labels = in_loss_precision(clean), part.labels
    probabilities = in_loss_precision(logits).softmax(1)
    wrong = probabilities.masked_fill(_mask(labels, probabilities), 0.0)
    likeliest_wrong = _picked(wrong, wrong.argmax(1))
    boosted = (
        class_loss(logits, part.labels, reduction="sum") - (1.0001 - likeliest_wrong).log().sum()
    )
    doubt = 1.0000001 - _picked(clean.softmax(1), labels)
    kl = (kl_rows(clean, logits) * doubt).sum() / part.total
    return logits, {"bce": boosted / part.total, "kl": beta * kl}


def _picked(rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows[k, columns[k]], [B].

    Not by gather: its deterministic backward copies from the host, which no graph can hold.
    """
    return rows.where(_mask(columns, rows), 0.0).sum(1)


def _mask(columns: Tensor, rows: Tensor) -> Tensor:
    """Return where column columns[k] of row k is, bool like rows [B, K]."""
    return columns[:, None] == torch.arange(rows.shape[1], device=rows.device)


def robal(
    forward: Forward,
    part: Part,
    *,
    head: CosineHead,
    margins: Tensor,
    offsets: Tensor,
    beta: float,
) -> tuple[Tensor, Terms]:
    """Compute CE(s (cos_k - m_k [k = y]) + tau_b log pi_k) on adv + beta KL(clean || adv).

    margins [K]: m_k, see robal_margins; offsets [K]: tau_b log pi_k. The KL is that of the plain
    cosines. Source: MultiMarginLoss and add_reg_train of RoBal (CVPR 2021), whose classifier has
    scale 1 in training, its s standing in the loss. Dropped: a second forward of both batches.
    """
    clean, logits = _clean_and_adv(forward, part)
    cosines = head.cosines(logits)
    own = _mask(part.labels, logits)
    shifted = head.scale * (cosines - margins.to(cosines.dtype) * own)
    margin = class_loss(shifted, part.labels, offsets=offsets, reduction="sum") / part.total
    kl = kl_rows(head.cosines(clean), cosines).sum() / part.total
    return logits, {"margin": margin, "kl": beta * kl}


def _bound_robal(
    network: Network, statistics: ClassStatistics, config: Config
) -> Callable[[Forward, Part], tuple[Tensor, Terms]]:
    head = network.fc
    if not isinstance(head, CosineHead):
        raise ValueError("--objective robal: needs the cosine classifier; add --head cosine")
    margins = robal_margins(statistics.counts, head.scale, config.margin, config.margin_tau)
    offsets = config.prior_tau * log_prior(statistics)
    return partial(robal, head=head, margins=margins, offsets=offsets, beta=config.beta)


def robal_margins(counts: Tensor, scale: Tensor, margin: float, margin_tau: float) -> Tensor:
    """Return RoBal's margin of each class, m_k = m + (tau_m / s) log(n_k / n_min) [K]."""
    counts = counts.clamp(min=1).to(torch.promote_types(scale.dtype, torch.float32))
    return margin + margin_tau / scale * (counts / counts.min()).log()


def taet(forward: Forward, part: Part, *, second_stage: int) -> tuple[Tensor, Terms]:
    """Compute CE(clean) before epoch `second_stage` (from 0), then TAET's equalisation on adv.

    With L_c the mean CE of class c in the batch, 0 where it is absent, the latter is
    0.1 mean_c L_c + 0.1 mean_c (L_c - mean)^2 + 0.1 sum_c (L_c / sum L)^2. The stage is chosen on
    the device; logits are those of the images it trains on.
    Source: HARL.py and TAET.ipynb of TAET (CVPR 2025), whose first stage takes clean images.
    """
    equalising = part.epoch >= second_stage
    _, logits = forward(torch.where(equalising, part.adv, part.clean))
    count_(part.histogram, logits.argmax(1))
    everything, labels = part.gather(logits), part.gather(part.labels)
    losses = class_loss(everything, labels, reduction="none")  # [B]
    share = len(labels) / part.total
    equal = share * _class_equalisation(losses, labels, logits.shape[1])
    zero = torch.zeros_like(equal)
    ce = torch.where(equalising, zero, losses.sum() / part.total)
    return logits, {"ce": ce, "equal": torch.where(equalising, equal, zero)}


def kl_rows(clean: Tensor, adv: Tensor) -> Tensor:
    """Return KL(softmax clean || softmax adv) of each row [B] of logits [B, K], in float32."""
    log_clean = in_loss_precision(clean).log_softmax(1)
    log_adv = in_loss_precision(adv).log_softmax(1)
    return (log_clean.exp() * (log_clean - log_adv)).sum(1)


def log_prior(statistics: ClassStatistics) -> Tensor:
    """Return log(n_k / N) [K]."""
    return statistics.log_counts - torch.logsumexp(statistics.log_counts, 0)


def _clean_and_adv(forward: Forward, part: Part) -> tuple[Tensor, Tensor]:
    # Adversarial images last: the running statistics of BatchNorm lean towards what came last.
    _, clean = forward(part.clean)
    _, logits = forward(part.adv)
    count_(part.histogram, logits.argmax(1))
    return clean, logits


def _class_loss_term(
    logits: Tensor, part: Part, *, offsets: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    loss = class_loss(
        logits,
        part.labels,
        offsets=offsets,
        label_smoothing=label_smoothing,
        reduction="sum",
        histogram=part.histogram,
    )
    return loss / part.total


def _class_equalisation(losses: Tensor, labels: Tensor, classes: int) -> Tensor:
    # Not scatter_add: its order of summation on a GPU changes from run to run.
    member = (labels[:, None] == torch.arange(classes, device=labels.device)).to(losses.dtype)
    by_class = (losses[:, None] * member).sum(0) / member.sum(0).clamp(min=1)  # [K]
    mean = by_class.mean()
    shares = by_class / by_class.sum().clamp(min=1e-10)
    return TAET_SHARE * (mean + (by_class - mean).square().mean() + shares.square().sum())

"""Adversarial training as plain PyTorch is written well: what the fused step is compared with.

PGD on the cross-entropy and balanced softmax, in bfloat16 autocast, channels_last, with fused SGD
and nothing that waits for the device; crop and flip are made on the device too. The tail penalty is
left out, for it has no usual form. Under torch.compile the networks are compiled, the rest is not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.config import Config
from reat_fast.loaders import Batch
from reat_fast.networks.architectures import Network

PADDING = 4
Mode = Literal["reduce-overhead", "max-autotune"]


class PlainStep:
    """Take steps of plain PyTorch on one batch whose images lie on the device.

    model: any network on its device; counts: training images per class; compiled: the mode of
    torch.compile, which both modes replay as CUDA graphs, or None for eager.
    """

    def __init__(
        self,
        model: Network,
        batch: Batch,
        counts: Sequence[int],
        config: Config,
        compiled: Mode | None = None,
    ) -> None:
        assert batch.gather, "the images are taken by position"
        self._model, self._batch, self._config, self._compiled = model, batch, config, compiled
        self._network: Callable[[Tensor], Tensor] = model
        if compiled is not None:
            self._network = torch.compile(model, mode=compiled, dynamic=False)
        device = batch.labels.device
        self._log_counts = torch.tensor(counts, device=device).float().log()
        size, channels = batch.images.shape[1], batch.images.shape[3]
        self._shape = (len(batch.labels), channels, size, size)
        self._rows = torch.arange(len(batch.labels), device=device)[:, None, None]
        self._pixels = torch.arange(size, device=device)
        self._optimizer = torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def __call__(self) -> Tensor:
        """Take a step; returns its loss. Never waits for the device."""
        images = self._augmented()
        adv = self._attacked(images)
        self._model.train()
        self._begin()
        with self._autocast():
            logits = self._network(adv)
        loss = F.cross_entropy(logits.float() + self._log_counts, self._batch.labels)
        loss.backward()
        self._optimizer.step()
        # At once, for graphs of torch.compile write the next gradients where these are.
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _augmented(self) -> Tensor:
        """Return images [B, C, H, W] in [0, 1], cropped and flipped at random."""
        chosen = self._batch.images[self._batch.indices]
        padded = F.pad(chosen, (0, 0, PADDING, PADDING, PADDING, PADDING))
        device, size = chosen.device, len(self._pixels)
        shifts = torch.randint(0, 2 * PADDING + 1, (2, len(chosen), 1), device=device)
        flips = torch.randint(0, 2, (len(chosen), 1), device=device)
        across = torch.where(flips == 1, size - 1 - self._pixels, self._pixels) + shifts[0]
        down = self._pixels + shifts[1]
        cropped = padded[self._rows, down[:, :, None], across[:, None, :]]  # [B, H, W, C]
        return cropped.permute(0, 3, 1, 2).float().div_(255)

    def _attacked(self, images: Tensor) -> Tensor:
        config = self._config
        self._model.eval()
        if self._compiled is not None:  # it would compute every weight gradient in each iteration
            self._model.requires_grad_(False)
        low, high = (images - config.eps).clamp_(min=0), (images + config.eps).clamp_(max=1)
        adv = images + torch.empty_like(images).uniform_(-config.eps, config.eps)
        with self._autocast():  # one for all iterations, so that each weight is rounded once
            for _ in range(config.steps):
                adv = adv.detach().requires_grad_()
                self._begin()
                loss = F.cross_entropy(self._network(adv), self._batch.labels, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, adv)
                moved = adv.detach().add_(gradient.sign(), alpha=config.step_size)
                adv = torch.minimum(torch.maximum(moved, low), high)
        if self._compiled is not None:
            self._model.requires_grad_(True)
        return adv.detach()

    def _begin(self) -> None:
        """Tell graphs of torch.compile that what earlier calls returned is not needed any more."""
        if self._compiled is not None:
            torch.compiler.cudagraph_mark_step_begin()

    def _autocast(self) -> Any:
        return torch.autocast(self._batch.labels.device.type, torch.bfloat16)

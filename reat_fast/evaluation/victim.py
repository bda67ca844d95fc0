"""The network under attack: quick logits to search with, the model's own in float32 to judge by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from reat_fast.engine.graph import can_capture
from reat_fast.engine.precision import Precision, allowed_tf32, full_precision, low_dtype
from reat_fast.evaluation.passes import RecordedPasses, Replays, filled_up
from reat_fast.methods.work import FORWARD, WITH_GRADIENT
from reat_fast.networks.borrowed import evaluating, first_tensor
from reat_fast.networks.copies import copy_of
from reat_fast.networks.frozen import FrozenNetwork, fastest_form
from reat_fast.networks.likeness import keeps
from reat_fast.networks.tracing import is_foreign


class Victim:
    """Give an attack its logits and gradients, and say in float32 which images are fooled.

    Made by `attacked`. Calling it on images [B, C, H, W] in [0, 1] returns logits [B, K] of the
    network with BatchNorm folded, in at least float32. dtype, device: those of images and verdicts.
    """

    def __init__(
        self,
        model: nn.Module,
        precision: Precision,
        bar: tqdm[Any] | None,
        say: Callable[[str], object],
    ) -> None:
        weight = first_tensor(model)
        self.model = model
        self.precision, self.say = precision, say
        self.device = weight.device
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self._on_gpu = self.device.type == "cuda"
        self._source = _channels_last(model) if self._on_gpu else model
        self._rewritten = True
        self._networks: dict[torch.dtype | None, FrozenNetwork] = {}
        self._frozen = self._network(low_dtype(precision))
        self._replays: Replays | None = None
        self._bar = tqdm(disable=True) if bar is None else bar
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)

    def check(self, images: Tensor) -> None:
        """Search with the model as it is where rewriting it changed more than rounding.

        images [B, C, H, W]: a few. A network's own code may do what a trace does not see; an attack
        on something else would leave images that the model does not get right.
        """
        if not is_foreign(self.model):
            return
        if keeps(self._source, self._network(None), self.precision == "bf16", images):
            return
        self._rewritten = False
        self._networks.clear()
        self._frozen = self._network(low_dtype(self.precision))

    def __call__(self, images: Tensor) -> Tensor:
        self.count(len(images) * (WITH_GRADIENT if images.requires_grad else FORWARD))
        recorded = None if images.requires_grad else self._recorded(images)
        if recorded is not None:
            return recorded.logits(images)
        if not self._on_gpu:
            return self.logits(images)
        return self.logits(filled_up(images))[: len(images)]

    def logits(self, images: Tensor) -> Tensor:
        """Return the logits of a call without counting it, for batches of one shape."""
        return self._frozen(images).to(self.dtype)

    def count(self, passes: int) -> None:
        """Move the progress bar on by forward passes of one image."""
        self._bar.update(passes)

    def gradient(
        self, images: Tensor, objective: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits [B, K], objective(logits) [B] and its gradient by the images."""
        recorded = self._recorded(images)
        if recorded is not None:
            self.count(len(images) * WITH_GRADIENT)
            return recorded.gradient(images, objective)
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self(images)
            values = objective(logits)
            (gradient,) = torch.autograd.grad(values.sum(), images)
        return logits.detach(), values.detach(), gradient

    @torch.no_grad()
    def true_logits(self, images: Tensor) -> Tensor:
        """Return the logits of the model itself, in float32 without TF32."""
        self.count(len(images))
        with full_precision():
            logits: Tensor = self.model(images)
        self._finite &= logits.isfinite().all()
        return logits

    @property
    def finite(self) -> bool:
        """Whether all verdicts came from logits that are numbers; waits for the device."""
        return bool(self._finite)

    def refuse_nonfinite(self) -> None:
        """Raise FloatingPointError where a verdict came from logits that are no numbers.

        The largest of them may well be the label's, and so count as right.
        """
        if not self.finite:
            raise FloatingPointError("some logits are NaN or infinite, as of weights that diverged")

    def fooled(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return which images [B] the model itself gets wrong, bool [B]; may not sync."""
        return self.true_logits(images).argmax(1) != labels

    def confirmed(self, suspected: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Return which of the images that the quick logits get wrong are fooled, bool [B]."""
        rows = suspected.nonzero().squeeze(1)
        found = torch.zeros_like(suspected)
        if len(rows):
            found[rows] = self.fooled(images[rows], labels[rows])
        return found

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Take passes from CUDA graphs inside the block, on a GPU, where their sizes last.

        Graphs hold memory: only for a search that takes many passes on batches that shrink.
        """
        if not can_capture(self.device):
            yield
            return
        replays = self._replays = Replays()
        try:
            yield
        finally:
            self._replays = None
            replays.close()

    def _recorded(self, images: Tensor) -> RecordedPasses | None:
        if self._replays is None:
            return None
        # They are recorded while the network in use is the one that they are known by.
        return self._replays.of(self.logits, self._frozen, images)

    @contextmanager
    def finer(self, images: Tensor) -> Iterator[None]:
        """Search with at least the 11 bits of TF32 inside the block, where precision is bf16.

        On a GPU that is float16, where it can hold the logits of images [B, C, H, W], else float32.
        """
        quick = self._frozen
        if self.precision == "bf16":
            self._frozen = self._finer(images)
        try:
            yield
        finally:
            self._frozen = quick

    def _finer(self, images: Tensor) -> FrozenNetwork:
        if not self._on_gpu:
            return self._network(None)
        half = self._network(torch.float16)
        return half if half(filled_up(images)).isfinite().all() else self._network(None)

    def _network(self, dtype: torch.dtype | None) -> FrozenNetwork:
        """Return the folded network in 16 bits, or, for None, as fine as the model; made once."""
        if dtype not in self._networks:
            weight = first_tensor(self._source)
            form = fastest_form(dtype or weight.dtype, weight.device)
            self._networks[dtype] = FrozenNetwork(self._source, dtype, form, self._rewritten)
        return self._networks[dtype]

    def expect(self, what: str, passes: int) -> None:
        """Tell the progress bar what is running and how many passes are left at most."""
        self._bar.set_description_str(what, refresh=False)
        self._bar.total = self._bar.n + passes
        self._bar.refresh()


def _channels_last(model: nn.Module) -> nn.Module:
    """Copy a model, with its weights in the layout of the images.

    Others would be turned round again at every convolution.
    """
    turned = copy_of(model)
    turned.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return turned


class PerImage:
    """The state of a search; a dataclass whose tensors each have one row per image left."""

    def keep(self, kept: Tensor) -> None:
        """Keep the images where kept, bool [B], is true; the others have left the search."""
        for field in fields(self):  # type: ignore[arg-type]
            setattr(self, field.name, getattr(self, field.name)[kept])


@contextmanager
def attacked(
    model: nn.Module,
    precision: Precision = "float32",
    bar: tqdm[Any] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> Iterator[Victim]:
    """Put a model into eval mode and open it to attacks; its modes are given back after.

    precision: arithmetic of the search; the verdict is float32, without TF32, or float64 where the
    model is. bar: a progress bar in forward passes of one image. say: gets lines of what is known
    before a long search ends.
    Errors: ValueError for a model of fewer bits than float32, or that is no module with weights.
    """
    weight = first_tensor(model)
    if weight.dtype.itemsize < 4:
        raise ValueError(
            f"model: {weight.dtype}; give it in float32, precision bf16 searches in bfloat16"
        )
    with (
        evaluating(model),
        allowed_tf32(precision != "float32"),
        torch.inference_mode(False),  # which knows no gradients
        torch.cuda.device_of(weight),  # whose streams, and what Triton launches on, are meant
    ):
        yield Victim(model, precision, bar, say)

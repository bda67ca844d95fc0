"""Projected gradient descent in a ball round each image: what training and evaluation share.

Only the gradient with respect to the images is computed. The images stay in float32 whatever the
network computes in: a step of 2/255 would be rounded away in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn

from reat_fast.kernels.class_loss import class_loss, class_loss_gradient
from reat_fast.kernels.l2 import l2_step_
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.triton_support import device_number
from reat_fast.networks.borrowed import evaluating

__all__ = ["PGD", "pgd"]

Classifier = Callable[[Tensor], Tensor]
AttackLoss = Callable[[Tensor, Tensor], Tensor]
Norm = Literal["linf", "l2"]

STEPS = {"linf": linf_step_, "l2": l2_step_}
"""One step of the attack in each norm, in place: along the sign of the gradient, or along it."""


@dataclass(frozen=True, eq=False)
class SummedClassLoss:
    """Sum class_loss over the batch; a mean would shrink gradients by the batch size.

    offsets, weights [C]: those of class_loss. `gradient` is what an attack wants of it.
    """

    offsets: Tensor | None = None
    weights: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the sum for logits [B, C] and labels [B]."""
        return class_loss(
            logits, labels, offsets=self.offsets, weights=self.weights, reduction="sum"
        )

    def gradient(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of the sum by the logits, in one kernel."""
        return class_loss_gradient(logits, labels, offsets=self.offsets, weights=self.weights)


cross_entropy = SummedClassLoss()


def pgd(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor = 8 / 255,
    step_size: float | Tensor = 2 / 255,
    steps: int = 10,
    start: Tensor | None = None,
    loss: AttackLoss | None = None,
    clip: tuple[float, float] = (0.0, 1.0),
    nonfinite: Tensor | None = None,
    norm: Norm = "linf",
) -> Tensor:
    """Search the ball round each image for one that raises the loss.

    images [B, C, H, W] in `clip`; labels int64 [B]. norm: "linf", or "l2", in which eps and
    step_size are lengths over a whole image (usual: 128/255 and 15/255). eps and step_size: a
    number or one per sample, Tensor [B]. start: noise like images that is added before the first
    step and not clamped then, as in the official REAT code; None draws it evenly from the ball.
    loss(logits, labels) -> scalar that should be a sum over samples; None is cross-entropy.
    nonfinite: int64 device tensor to which the number of NaN and infinite gradient elements is
    added.
    Returns images within eps of the given ones and inside `clip`; the model's mode and its
    gradients are left as they are, so BatchNorm in train mode counts its statistics, which PGD
    keeps it from. Nothing syncs, so images outside `clip` and labels below 0, which cross-entropy
    leaves out, are not found; PGD does.
    Errors: ValueError for images that are not floating-point, labels of another number, a radius,
    step or number of steps below 0, a radius in L-infinity beyond `clip`, another norm, and under
    torch.inference_mode, which knows no gradients.
    Source: Madry et al., ICLR 2018; the order of operations is that of the official REAT code.
    """
    _refuse(images, labels, eps, step_size, steps, norm)
    _refuse_levels(eps, norm, clip)
    if isinstance(eps, Tensor):
        eps = device_number(eps, images, "eps")  # else one of another shape fails in the noise
    if start is None:
        start = uniform_noise(images, eps) if norm == "linf" else l2_noise(images, eps)
    return ascend_(
        model,
        images.detach() + start,
        images.detach(),
        labels,
        eps=eps,
        step_size=step_size,
        steps=steps,
        loss=cross_entropy if loss is None else loss,
        clip=clip,
        nonfinite=nonfinite,
        norm=norm,
    )


def ascend_(
    model: Classifier,
    adv: Tensor,
    clean: Tensor,
    labels: Tensor,
    *,
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    loss: AttackLoss,
    clip: tuple[float, float] = (0.0, 1.0),
    nonfinite: Tensor | None = None,
    norm: Norm = "linf",
) -> Tensor:
    """Take the steps of pgd round `clean` from `adv`, noise added, which they write to; see pgd."""
    if not (adv.is_contiguous() or adv.is_contiguous(memory_format=torch.channels_last)):
        adv = adv.contiguous()  # of rotated images, say: a step reads each as one run of memory
    # Once, and not once a step: a number would be written to the device at each of them.
    step_size = device_number(step_size, clean, "step_size")
    eps = device_number(eps, clean, "eps")
    for _ in range(steps):
        adv = adv.detach()
        gradient = _input_gradient(model, adv, labels, loss)
        STEPS[norm](adv, gradient, clean, step_size, eps, clip=clip, nonfinite=nonfinite)
    return adv.detach().clamp(*clip)


def _input_gradient(model: Classifier, images: Tensor, labels: Tensor, loss: AttackLoss) -> Tensor:
    frozen = None if isinstance(model, nn.Module) else model  # whose names are its owner's
    own: Callable[[Tensor, Tensor, AttackLoss], Tensor] | None
    own = getattr(frozen, "input_gradient", None)  # a compiled network has it in one piece
    if own is not None:
        gradient: Tensor = own(images, labels, loss)
        return gradient
    taken: torch.dtype = getattr(frozen, "images_dtype", images.dtype)
    images = images.detach()
    if taken.itemsize < images.dtype.itemsize:
        # The network would round them itself, and its gradient would be made wide again: a step
        # takes it as it is.
        images = images.to(taken)
    images.requires_grad_()
    with torch.enable_grad():
        logits = model(images)
        if not isinstance(loss, SummedClassLoss):
            return torch.autograd.grad(loss(logits, labels), images)[0]
    return torch.autograd.grad(logits, images, loss.gradient(logits, labels))[0]


def _refuse(
    images: Tensor,
    labels: Tensor,
    eps: float | Tensor,
    step_size: float | Tensor,
    steps: int,
    norm: str,
) -> None:
    if norm not in STEPS:
        raise ValueError(f"norm: {norm!r}; give one of {', '.join(STEPS)}")
    _refuse_arrays(images)
    if not images.is_floating_point():
        raise ValueError(f"images: {images.dtype}; divide bytes by 255, the attack moves fractions")
    if torch.is_inference_mode_enabled():
        raise ValueError("torch.inference_mode: knows no gradients; use torch.no_grad in its place")
    _refuse_labels(labels, len(images))
    for name, value in (("eps", eps), ("step_size", step_size)):
        number = isinstance(value, (Tensor, Real))
        if not number or (not isinstance(value, Tensor) and not value >= 0):
            raise ValueError(f"{name}: {value!r}; must be a number, 0 or more")
    if not isinstance(steps, Integral) or steps < 0:
        raise ValueError(f"steps: {steps!r}; must be a whole number, 0 or more")


def _refuse_levels(eps: float | Tensor, norm: str, clip: tuple[float, float]) -> None:
    """Refuse a radius in levels of 255, within which every image lies."""
    span = clip[1] - clip[0]
    if norm == "linf" and not isinstance(eps, Tensor) and eps > span:
        usual = "; 8/255 is usual" if clip == (0, 1) else ""
        raise ValueError(f"eps: {eps!r}; must lie in [0, {span:g}], as images do{usual}")


def _refuse_arrays(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(f"images: a {type(images).__name__}; give a tensor")


def _refuse_labels(labels: Tensor, images: int) -> None:
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels: a {type(labels).__name__}; give a tensor, one label an image")
    if len(labels) != images:
        raise ValueError(f"labels: {len(labels)} of them for {images} images")


class PGD:
    """Attack a classifier with an object that is called on images and labels.

    PGD(model, eps=8/255, alpha=2/255, steps=10)(images, labels) returns adversarial images. The
    attack runs in eval mode and every module gets back the mode it had. alpha is the step size;
    random_start=False begins at the clean images; norm is that of eps and alpha, see pgd. A model
    in train mode is one thread's at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        norm: Norm = "linf",
    ) -> None:
        self.model = model
        self.eps = eps
        self.alpha = alpha
        self.steps = steps
        self.random_start = random_start
        self.norm = norm

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return adversarial images [B, C, H, W] for images in [0, 1] and labels [B].

        Errors: ValueError for images outside [0, 1], negative labels, and what pgd refuses.
        """
        _refuse_arrays(images)
        if not bool(((images >= 0) & (images <= 1)).all()):
            low, high = float(images.min()), float(images.max())
            raise ValueError(
                f"images: pixels reach from {low:.9g} to {high:.9g}; give images in [0, 1] and "
                "normalise inside the model"
            )
        _refuse_labels(labels, len(images))
        if labels.numel() and int(labels.min()) < 0:
            raise ValueError(f"labels: {int(labels.min())}; must be classes, from 0 on")
        # Tensors of inference mode have no gradients; what is made outside of it does.
        with evaluating(self.model), torch.inference_mode(False):
            images, labels = (t.clone() if t.is_inference() else t for t in (images, labels))
            return pgd(
                self.model,
                images,
                labels,
                eps=self.eps,
                step_size=self.alpha,
                steps=self.steps,
                start=None if self.random_start else torch.zeros_like(images),
                norm=self.norm,
            )


def uniform_noise(images: Tensor, eps: float | Tensor) -> Tensor:
    """Draw U(-eps, eps) like images from the default generator; eps a number or Tensor [B]."""
    per_image = isinstance(eps, Tensor) and eps.ndim
    radius = eps.to(images.dtype).view(-1, 1, 1, 1) if per_image else eps  # type: ignore[union-attr]
    return (torch.rand_like(images) * 2 - 1) * radius


def l2_noise(images: Tensor, eps: float | Tensor) -> Tensor:
    """Draw evenly from the L2 ball of eps, a number or Tensor [B], by the default generator."""
    size = images[:1].numel()
    inside = torch.rand(len(images), dtype=images.dtype, device=images.device)
    return of_length(torch.randn_like(images), inside ** (1 / max(size, 1)) * eps)


def of_length(noise: Tensor, length: float | Tensor) -> Tensor:
    """Give each row of noise [B, ...] an L2 length, a number or Tensor [B]; 0 stays 0."""
    lengths = torch.linalg.vector_norm(noise.flatten(1), dim=1)
    scale = length / lengths.where(lengths > 0, torch.ones_like(lengths))
    scaled: Tensor = noise * scale.to(noise.dtype).view(-1, *(1,) * (noise.ndim - 1))
    return scaled

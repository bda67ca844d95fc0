"""The folded network and whole training steps against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast import reference
from reat_fast.config import Config
from reat_fast.frozen import FrozenNetwork
from reat_fast.kernels.class_weights import rbl_weights
from reat_fast.models import create_model
from reat_fast.networks import Network
from reat_fast.parity_ops import COUNTS, EPS, STEP_SIZE, Row, generator, name_of, worst
from reat_fast.step import TrainStep, make_optimizer


def compare_steps(device: torch.device) -> Iterator[Row]:
    """Yield the comparisons of networks, attacks and steps, as they are made."""
    yield from _folding(device)
    yield from _rbl_inertness(device)
    yield from _training_step(device)
    yield from _bfloat16(device)


def _folding(device: torch.device) -> Iterator[Row]:
    for name in ("resnet8", "preact_resnet18"):
        model = _trained(name, device).double()
        images = torch.rand(4, 3, 16, 16, generator=generator(), dtype=torch.float64)
        results = []
        for network in (FrozenNetwork(model), model.eval()):
            leaf = images.to(device).requires_grad_()
            logits = network(leaf)
            (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
            results.append((logits.detach(), gradient))
        for what, found, expected in zip(("logits", "gradient"), *results, strict=True):
            error = worst(found, expected)
            yield Row("folded network", f"{name} {what}, relative", "float64", error, 1e-10)


def _rbl_inertness(device: torch.device) -> Iterator[Row]:
    model = _trained("resnet8", device).eval()
    images, labels, start = (t.to(device) for t in _batch(64, 32))
    weights = rbl_weights(torch.tensor(COUNTS), torch.tensor(COUNTS[::-1])).to(device)

    def attacked(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return reference.pgd(
            model,
            images,
            labels,
            eps=EPS,
            step_size=STEP_SIZE,
            steps=10,
            start=start,
            loss=loss,
        )

    weighted = attacked(lambda logits, y: reference.rbl_loss(logits, y, weights))
    plain = attacked(lambda logits, y: F.cross_entropy(logits, y))
    differing = int((weighted != plain).sum())
    case = f"RBL against plain attack, differing of {plain.numel():,} pixels"
    yield Row("inertness", case, "float32", differing, 0)


def _training_step(device: torch.device) -> Iterator[Row]:
    # A gradient within rounding of zero may flip its sign, and one flip has reached half of all
    # pixels two steps later, whatever the implementation. It takes about 10^7 signs in float32 to
    # meet one, so float32 sees few pixels. The learning rates are exact in float32.
    images, labels, start = (t.to(device) for t in _batch(16, 8))
    float32, float64 = torch.float32, torch.float64
    for steps, lr, fast, dtype, tolerance in (
        (5, 2.0**-3, float64, float64, 1e-9),
        (1, 2.0**-3, float32, float64, 1e-4),
        (5, 2.0**-3, float32, float32, 1e-4),
    ):
        config = Config(lr=lr, precision="float32")
        model = _trained("resnet8", device).to(fast)
        exact = copy.deepcopy(model).to(dtype)
        fused = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        plain = torch.optim.SGD(exact.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        for _ in range(steps):
            found = fused(images.to(fast), labels, start.to(fast))
            expected = reference.train_step(
                exact,
                plain,
                images.to(dtype),
                labels,
                counts=COUNTS,
                ae_counts=COUNTS,
                start=start.to(dtype),
                eps=EPS,
                step_size=STEP_SIZE,
                steps=10,
            )
        case = f"{steps} at lr {lr:.3g} against {name_of(dtype)}"
        apart = (found["images_adv"] - expected["images_adv"]).abs() > 1e-6
        share = float(apart.double().mean())
        name = name_of(fast)
        yield Row("training step", f"{case}, share of pixels apart", name, share, 1e-4)
        error = worst(found["loss"], expected["loss"])
        yield Row("training step", f"{case}, loss, relative", name, error, tolerance)
        error = max(
            worst(a.detach(), b.detach())
            for a, b in zip(model.parameters(), exact.parameters(), strict=True)
        )
        yield Row("training step", f"{case}, weights, relative", name, error, tolerance)


def _bfloat16(device: torch.device) -> Iterator[Row]:
    # A rounding is 2^-9 = 0.002 relative. A dozen layers round weights and maps; the errors add up
    # like a walk, not like a sum. Signs near zero differ, so the losses are compared, not pixels.
    images, labels, start = (t.to(device) for t in _batch(64, 16))
    outcomes = []
    for precision in ("float32", "bf16"):
        config = Config(precision=precision, lr=2.0**-3)
        model = _trained("resnet18", device)
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        outcomes.append(step(images, labels, start))
    error = worst(outcomes[1]["loss"], outcomes[0]["loss"])
    yield Row("bfloat16 step", "loss against float32, relative", "bfloat16", error, 2.0**-6)
    reach = outcomes[1]["images_adv"].double() - images.double()
    excess = max(float(reach.abs().max()) - EPS, 0.0)
    # The images stay float32: the ball and the image are rounded once each, by 2^-25 and 2^-24.
    yield Row("bfloat16 step", "pixels beyond the ball, absolute", "float32", excess, 1.2e-7)


def _batch(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    made = generator()
    images = torch.rand(batch, 3, size, size, generator=made)
    labels = torch.randint(0, 10, (batch,), generator=made)
    start = (torch.rand(images.shape, generator=made) * 2 - 1) * EPS
    return images, labels, start


def _trained(name: str, device: torch.device) -> Network:
    """Make a narrow network whose running statistics are those of a batch."""
    torch.manual_seed(0)
    model = create_model(name, 10, width=8)
    for _ in range(20):
        model(torch.rand(64, 3, 32, 32))
    return model.to(device)

"""The folded network and whole training steps against the reference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast import reference
from reat_fast.config import Config
from reat_fast.engine.captured_step import CapturedStep
from reat_fast.engine.precision import allowed_tf32, determinism
from reat_fast.kernels import winograd
from reat_fast.kernels.class_weights import rbl_weights
from reat_fast.loaders import Batch
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network
from reat_fast.networks.frozen import Form, FrozenNetwork
from reat_fast.parity.rows import COUNTS, EPS, STEP_SIZE, Row, generator, name_of, worst
from reat_fast.step import TrainStep, make_optimizer


def compare_steps(device: torch.device) -> Iterator[Row]:
    """Yield the comparisons of networks, attacks and steps, as they are made."""
    yield from _folding(device)
    yield from _rbl_inertness(device)
    yield from _training_step(device)
    yield from _low_precision(device)
    yield from _same_bits(device)


def _folding(device: torch.device) -> Iterator[Row]:
    """Compare the forms of the attacked network that have float64; "cpu" wants a wide one."""
    cases: tuple[tuple[str, int, Form], ...] = (
        ("resnet8", 8, "eager"),
        ("preact_resnet18", 8, "eager"),
        ("resnet18", 8, "cudnn"),
        ("resnet8", winograd.LEAST_CHANNELS // 4, "cpu"),
    )
    for name, width, form in cases:
        model = _trained(name, device, width).double()
        images = torch.rand(4, 3, 16, 16, generator=generator(), dtype=torch.float64)
        results = []
        for network in (FrozenNetwork(model, form=form), model.eval()):
            leaf = images.to(device).requires_grad_()
            logits = network(leaf)
            (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
            results.append((logits.detach(), gradient))
        for what, found, expected in zip(("logits", "gradient"), *results, strict=True):
            case = f"{name}, {form}: {what}, relative"
            yield Row("folded network", case, "float64", worst(found, expected), 1e-10)


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


def _low_precision(device: torch.device) -> Iterator[Row]:
    # A rounding is 2^-9 = 0.002 relative in bfloat16, 2^-11 in TF32, which CPUs do not have. A
    # dozen layers round weights and maps; the errors add up like a walk, not like a sum. Signs near
    # zero differ, so the losses are compared, not pixels.
    images, labels, start = (t.to(device) for t in _batch(64, 16))
    exact = _outcome("float32", device, images, labels, start)
    tolerances = {"tf32": 2.0**-8} if device.type == "cuda" else {}
    for precision, tolerance in {**tolerances, "bf16": 2.0**-6}.items():
        found = _outcome(precision, device, images, labels, start)
        error = worst(found["loss"], exact["loss"])
        yield Row("precision", "loss against float32, relative", precision, error, tolerance)
        reach = found["images_adv"].double() - images.double()
        excess = max(float(reach.abs().max()) - EPS, 0.0)
        # The images stay float32: the ball and the image are rounded once each, by 2^-25 and 2^-24.
        yield Row("precision", "pixels beyond the ball, absolute", precision, excess, 1.2e-7)


def _outcome(
    precision: str, device: torch.device, images: Tensor, labels: Tensor, start: Tensor
) -> dict[str, Tensor]:
    config = Config(precision=precision, lr=2.0**-3)  # type: ignore[arg-type]
    model = _trained("resnet18", device)
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    with allowed_tf32(precision == "tf32"):
        return step(images, labels, start)


def _same_bits(device: torch.device) -> Iterator[Row]:
    """Take three steps twice as --deterministic does, and on a GPU a third time as one graph."""
    images, labels, _ = (t.to(device) for t in _batch(32, 16))
    indices = torch.arange(32, device=device)
    batch = Batch((images * 255).byte().permute(0, 2, 3, 1).contiguous(), labels, indices, False)
    forms = ["run again"] + ["captured"] * (device.type == "cuda")
    first = _three_steps(batch, device, captured=False)
    for form in forms:
        again = _three_steps(batch, device, captured=form == "captured")
        pairs = zip(first.values(), again.values(), strict=True)
        differing = sum(int((one != other).sum()) for one, other in pairs)
        case = f"deterministic, three steps {form}, differing numbers"
        yield Row("training step", case, "float32", differing, 0)


def _three_steps(batch: Batch, device: torch.device, captured: bool) -> dict[str, Tensor]:
    config = Config(precision="float32", lr=2.0**-3, deterministic=True)
    model = _trained("resnet8", device)
    step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
    with determinism():
        replayed = CapturedStep(step, batch) if captured else step
        for _ in range(3):
            replayed.train_on(batch)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _batch(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    made = generator()
    images = torch.rand(batch, 3, size, size, generator=made)
    labels = torch.randint(0, 10, (batch,), generator=made)
    start = (torch.rand(images.shape, generator=made) * 2 - 1) * EPS
    return images, labels, start


def _trained(name: str, device: torch.device, width: int = 8) -> Network:
    """Make a narrow network whose running statistics are those of a batch."""
    torch.manual_seed(0)
    model = create_model(name, 10, width=width)
    for _ in range(20):
        model(torch.rand(64, 3, 32, 32))
    return model.to(device)

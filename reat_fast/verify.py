"""python -m reat_fast.verify: hold every op and a whole training step against the reference.

On the machine it runs on: Triton kernels on a CUDA device, and on the CPU the PyTorch forms, or
the kernels in Triton's interpreter where TRITON_INTERPRET=1 is set. Exact values are float64, by
formulas written without the ops. Exit code 1 when any row falls short.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from reat_fast import reference
from reat_fast.command import choose_device, parse_flags, run_command
from reat_fast.config import Config
from reat_fast.frozen import FrozenNetwork
from reat_fast.kernels import philox
from reat_fast.kernels.class_loss import class_loss
from reat_fast.kernels.class_weights import rbl_weights
from reat_fast.kernels.l2 import l2_step_
from reat_fast.kernels.linf import linf_step_
from reat_fast.kernels.prepare import prepare
from reat_fast.kernels.tail_penalty import Form, tail_penalty
from reat_fast.kernels.triton_support import INTERPRETED, TRITON_INSTALLED, Backend
from reat_fast.models import create_model
from reat_fast.networks import Network
from reat_fast.step import TrainStep, make_optimizer

COUNTS = [4800, 3100, 2000, 1300, 850, 550, 360, 230, 150, 96]
AE_COUNTS = [5200, 2100, 3000, 900, 1250, 0, 640, 31, 1, 314]
EPS, STEP_SIZE = 8 / 255, 2 / 255

# Largest error over the largest exact value. Rounding the inputs is not an error of the op, so
# exact values start from the rounded inputs; what is left is the arithmetic, float32 inside
# (2^-24 = 6e-8 a rounding, some dozens of them), and for gradients the rounding to the input's own
# format: half an ulp, 2^-9 of bfloat16 and 2^-12 of float16 (2^-25 more where it is subnormal).
FLOAT32 = 1e-6
GRADIENT = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@dataclass(frozen=True)
class Row:
    """One comparison: an error in the unit that `case` names, and what it may be at most."""

    op: str
    case: str
    dtype: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the row holds; an error that is not a number does not."""
        return self.error <= self.tolerance


def verify(device: torch.device, backend: Backend = "auto") -> Iterator[Row]:
    """Yield the comparisons, one after another as they are made."""
    yield from _random_numbers(device)
    yield from _prepare(device, backend)
    yield from _linf_step(device, backend)
    yield from _l2_step(device, backend)
    yield from _class_loss(device, backend)
    yield from _tail_penalty(device, backend)
    yield from _rbl_weights(device)
    yield from _folding(device)
    yield from _rbl_inertness(device)
    yield from _training_step(device)
    yield from _bfloat16(device)


def _random_numbers(device: torch.device) -> Iterator[Row]:
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123: counter 0, key 0
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    found = [int(word) for word in philox.philox((zero, zero, zero, zero), (zero, zero))]
    wrong = sum(a != b for a, b in zip(found, known, strict=True))
    yield Row("philox", "words unlike Random123's", "uint32", wrong, 0)


def _prepare(device: torch.device, backend: Backend) -> Iterator[Row]:
    made = _generator()
    images = torch.randint(0, 256, (40, 32, 32, 3), generator=made, dtype=torch.uint8)
    indices = torch.randperm(40, generator=made)[:24]
    on_device = (images.to(device), indices.to(device))
    clean, start = prepare(*on_device, 3, 1, EPS, backend=backend)
    shifts, flips = _augmentation(indices)
    exact = torch.stack(
        [
            _crop_and_flip(images[i], down, right, flip)
            for i, (down, right), flip in zip(indices, shifts, flips, strict=True)
        ]
    )
    differing = int((clean.cpu() != exact.float() / 255).sum())
    yield Row("prepare", "pixels that differ", "float32", differing, 0)
    # noise <= eps and the pixel <= 1 are float32 numbers, their sum is rounded once: 2^-24.
    noise = start.cpu().double() - exact.double() / 255
    words = philox.random_bits(3, 1, indices, philox.START, 32 * 32 * 3)
    expected = (philox.uniform(words).double() * 2 - 1) * EPS
    expected = expected.view(24, 32, 32, 3).permute(0, 3, 1, 2)
    yield Row("prepare", "start, absolute", "float32", _worst(noise, expected, 1.0), 2e-7)


def _augmentation(indices: Tensor) -> tuple[list[list[int]], list[bool]]:
    words = philox.random_bits(3, 1, indices, philox.AUGMENT, 3)
    shifts = (philox.integers(words[:, :2], 9) - 4).tolist()
    return shifts, philox.bernoulli(words[:, 2], 0.5).tolist()


def _crop_and_flip(image: Tensor, down: int, right: int, flip: bool) -> Tensor:
    height, width, channels = image.shape
    padded = torch.zeros(height + 8, width + 8, channels, dtype=torch.uint8)
    padded[4 : 4 + height, 4 : 4 + width] = image
    crop = padded[4 + down : 4 + down + height, 4 + right : 4 + right + width]
    return (crop.flip(1) if flip else crop).permute(2, 0, 1)


def _linf_step(device: torch.device, backend: Backend) -> Iterator[Row]:
    for dtype in GRADIENT:
        adv, gradient, clean = _attack_tensors(device, dtype)
        expected = adv + STEP_SIZE * gradient.sign().float()
        expected = torch.min(torch.max(expected, clean - EPS), clean + EPS).clamp(0, 1)
        linf_step_(adv, gradient, clean, STEP_SIZE, EPS, backend=backend)
        differing = int((adv != expected).sum())
        yield Row("linf_step", "pixels that differ", _name(dtype), differing, 0)


def _l2_step(device: torch.device, backend: Backend) -> Iterator[Row]:
    adv, gradient, clean = _attack_tensors(device, torch.float32)
    exact = [t.double().flatten(1) for t in (adv, gradient, clean)]
    moved = exact[0] + 0.2 * F.normalize(exact[1], dim=1, eps=0.0)
    away = moved - exact[2]
    length = away.norm(dim=1, keepdim=True)
    expected = (exact[2] + away * (0.5 / length).clamp(max=1)).clamp(0, 1)
    l2_step_(adv, gradient, clean, 0.2, 0.5, backend=backend)
    error = _worst(adv.flatten(1), expected, 1.0)
    yield Row("l2_step", "absolute", "float32", error, FLOAT32)


def _attack_tensors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    made, shape = _generator(), (24, 3, 32, 32)
    clean = torch.rand(shape, generator=made)
    adv = clean + (torch.rand(shape, generator=made) * 2 - 1) * EPS
    gradient = torch.randn(shape, generator=made).to(dtype)
    gradient[:, :, ::7] = 0
    tensors = (t.to(device).contiguous(memory_format=torch.channels_last) for t in (adv, clean))
    adv, clean = tensors
    return adv, gradient.to(device).contiguous(memory_format=torch.channels_last), clean


def _class_loss(device: torch.device, backend: Backend) -> Iterator[Row]:
    made = _generator()
    for classes, smoothing in ((10, 0.0), (100, 0.1), (1000, 0.0)):
        batch = 128 if classes < 1000 else 32
        logits = 4 * torch.randn(batch, classes, generator=made)
        labels = torch.randint(0, classes, (batch,), generator=made)
        offsets, weights = torch.rand(2, classes, generator=made) * 5 + 0.1
        for dtype, tolerance in GRADIENT.items():
            rounded = logits.to(dtype)
            exact = rounded.double().requires_grad_()
            expected = F.cross_entropy(
                exact + offsets.double(), labels, weights.double(), label_smoothing=smoothing
            )
            expected.backward()
            fast = rounded.to(device, copy=True).requires_grad_()
            histogram = torch.zeros(classes, dtype=torch.int64, device=device)
            found = class_loss(
                fast,
                labels.to(device),
                offsets=offsets.to(device),
                weights=weights.to(device),
                label_smoothing=smoothing,
                histogram=histogram,
                backend=backend,
            )
            found.backward()
            assert fast.grad is not None and exact.grad is not None
            case, name = f"C={classes}", _name(dtype)
            error = _worst(found.detach(), expected.detach())
            yield Row("class_loss", f"{case} loss, relative", name, error, FLOAT32)
            error = _worst(fast.grad, exact.grad)
            yield Row("class_loss", f"{case} gradient, relative", name, error, tolerance)
            predicted = rounded.float().argmax(1).bincount(minlength=classes)
            wrong = int((histogram.cpu() != predicted).sum())
            yield Row("class_loss", f"{case} classes miscounted", name, wrong, 0)


def _tail_penalty(device: torch.device, backend: Backend) -> Iterator[Row]:
    made = _generator()
    features = torch.randn(32, 96, generator=made)
    labels = torch.randint(0, 10, (32,), generator=made)
    labels[:3] = torch.tensor([9, 8, 9])
    forms: tuple[Form, ...] = ("official", "pairwise")
    for form in forms:
        for dtype, tolerance in GRADIENT.items():
            rounded = features.to(dtype)
            exact = rounded.double().requires_grad_()
            expected = reference.tail_penalty(exact, labels, COUNTS, form=form)
            expected.backward()
            fast = rounded.to(device, copy=True).requires_grad_()
            found = tail_penalty(
                fast,
                labels.to(device),
                torch.tensor(COUNTS, device=device),
                form=form,
                backend=backend,
            )
            found.backward()
            assert fast.grad is not None and exact.grad is not None
            name = _name(dtype)
            error = _worst(found.detach(), expected.detach())
            case = f"{form}, against the double loop"
            yield Row("tail_penalty", f"{case}, relative", name, error, 4 * FLOAT32)
            error = _worst(fast.grad, exact.grad)
            # The official gradient is near 1e-4, where float16 has lost two of its digits.
            loose = 2.0**-9 if dtype == torch.float16 else 2 * tolerance
            yield Row("tail_penalty", f"{form} gradient, relative", name, error, loose)


def _rbl_weights(device: torch.device) -> Iterator[Row]:
    found = rbl_weights(torch.tensor(COUNTS, device=device), torch.tensor(AE_COUNTS, device=device))
    effective = []
    for n, a in zip(COUNTS, AE_COUNTS, strict=True):
        beta = (n - 1) / n
        effective.append(sum(beta**k for k in range(a)))  # the series, free of cancellation
    inverse = torch.tensor([1 / (e + 1e-5) for e in effective], dtype=torch.float64)
    expected = inverse / inverse.sum() * len(COUNTS)
    error = float(((found.cpu().double() - expected) / expected).abs().max())
    yield Row("rbl_weights", "relative, each class", "float32", error, 2.0**-22)


def _folding(device: torch.device) -> Iterator[Row]:
    for name in ("resnet8", "preact_resnet18"):
        model = _trained(name, device).double()
        images = torch.rand(4, 3, 16, 16, generator=_generator(), dtype=torch.float64)
        results = []
        for network in (FrozenNetwork(model), model.eval()):
            leaf = images.to(device).requires_grad_()
            logits = network(leaf)
            (gradient,) = torch.autograd.grad(logits.square().sum(), leaf)
            results.append((logits.detach(), gradient))
        for what, found, expected in zip(("logits", "gradient"), *results, strict=True):
            error = _worst(found, expected)
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
        case = f"{steps} at lr {lr:.3g} against {_name(dtype)}"
        apart = (found["images_adv"] - expected["images_adv"]).abs() > 1e-6
        share = float(apart.double().mean())
        name = _name(fast)
        yield Row("training step", f"{case}, share of pixels apart", name, share, 1e-4)
        error = _worst(found["loss"], expected["loss"])
        yield Row("training step", f"{case}, loss, relative", name, error, tolerance)
        error = max(
            _worst(a.detach(), b.detach())
            for a, b in zip(model.parameters(), exact.parameters(), strict=True)
        )
        yield Row("training step", f"{case}, weights, relative", name, error, tolerance)


def _bfloat16(device: torch.device) -> Iterator[Row]:
    # A rounding is 2^-9 = 0.002 relative. A dozen layers round weights and maps; the errors add up
    # like a walk, not like a sum. Signs near zero differ, so the losses are compared, not pixels.
    images, labels, start = (t.to(device) for t in _batch(64, 16))
    outcomes = []
    for precision in ("float32", "bf16"):
        config = Config(precision=precision, lr=2.0**-3)  # type: ignore[arg-type]
        model = _trained("resnet18", device)
        step = TrainStep(model, make_optimizer(model, config), COUNTS, config)
        outcomes.append(step(images, labels, start))
    error = _worst(outcomes[1]["loss"], outcomes[0]["loss"])
    yield Row("bfloat16 step", "loss against float32, relative", "bfloat16", error, 2.0**-6)
    reach = outcomes[1]["images_adv"].double() - images.double()
    excess = max(float(reach.abs().max()) - EPS, 0.0)
    # The images stay float32: the ball and the image are rounded once each, by 2^-25 and 2^-24.
    yield Row("bfloat16 step", "pixels beyond the ball, absolute", "float32", excess, 1.2e-7)


def _batch(batch: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    made = _generator()
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


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def _worst(found: Tensor, exact: Tensor, scale: float | None = None) -> float:
    """Return the largest error over `scale`, which is the largest exact value where it is None."""
    exact = exact.double().cpu()
    error = (found.double().cpu() - exact).abs().max()
    return float(error / (exact.abs().max() if scale is None else scale))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Options:
    """Hold every op and a whole training step against the float64 reference on this machine."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print the rows as JSON."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns 0 when every row holds, else 1."""
    options = parse_flags(Options, list(arguments), "python -m reat_fast.verify")
    device = choose_device(options.device)
    kernels = TRITON_INSTALLED and (device.type == "cuda" or INTERPRETED)
    backend: Backend = "triton" if kernels else "torch"
    with _full_precision():
        rows = []
        if not options.json:
            how = "Triton kernels" if kernels else "PyTorch forms"
            print(f"{how}{' in the interpreter' if INTERPRETED else ''} on {device}")
            print(f"{'op':15} {'case':62} {'dtype':9} {'error':>9} {'at most':>9}")
        for row in verify(device, backend):
            rows.append(row)
            if not options.json:
                print(
                    f"{row.op:15} {row.case:62} {row.dtype:9} {row.error:9.2g} "
                    f"{row.tolerance:9.2g}  {'ok' if row.ok else 'FALLS SHORT'}",
                    flush=True,
                )
    short = sum(not row.ok for row in rows)
    if options.json:
        print(json.dumps([{**asdict(row), "ok": row.ok} for row in rows], indent=2))
    else:
        print(f"{len(rows) - short} of {len(rows)} rows hold")
    return 1 if short else 0


class _full_precision:
    """Switch TF32 off inside the block: parity is measured in true float32."""

    def __enter__(self) -> None:
        self._cudnn = torch.backends.cudnn.allow_tf32
        self._matmul = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cudnn.allow_tf32 = self._cudnn
        torch.backends.cuda.matmul.allow_tf32 = self._matmul


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))

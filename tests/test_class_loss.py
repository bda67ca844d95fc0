"""The class loss, in PyTorch and as a kernel, against torch's cross_entropy in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from reat_fast.kernels import class_loss as module
from reat_fast.kernels.class_loss import (
    class_loss,
    class_loss_gradient,
    class_loss_rows,
    class_loss_rows_torch,
)
from reat_fast.kernels.triton_support import TRITON_INSTALLED

PLACES = [
    pytest.param("torch", "cpu", id="torch"),
    pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.interpreter),
    pytest.param("triton", "cuda", id="gpu", marks=pytest.mark.gpu),
]
# Probabilities of impossible classes, and rows beyond the batch, pass through inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
everywhere = pytest.mark.parametrize(("backend", "device"), PLACES)

# The logits and offsets below stay under 2^5, so their float32 sum is off by 2^-20 at most, and a
# loss or a probability by a few times that (a thousandth of it on top for 1000 exponentials).
ROUNDING = 4 * 2.0**-20
# The gradient is rounded once more, to the dtype of the logits.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the smallest float16: what a gradient element may lose on top of its unit.
SUBNORMAL = 2.0**-25

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "balanced softmax": {"offsets": True},
    "re-balanced": {"weights": True},
    "smoothed": {"label_smoothing": 0.1},
    "all": {"offsets": True, "weights": True, "label_smoothing": 0.3},
}
SIZES = [(1, 2), (7, 3), (128, 10), (33, 100), (5, 1000)]


def make_batch(batch: int, classes: int, dtype: torch.dtype, device: str, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(batch + classes)
    logits = (torch.randn(batch, classes, generator=generator) * 3).to(device, dtype)
    labels = torch.randint(classes, (batch,), generator=generator).to(device)
    if "offsets" in options:
        options["offsets"] = torch.randint(1, 5000, (classes,), generator=generator).log()
    if "weights" in options:
        options["weights"] = torch.rand(classes, generator=generator)
    return (
        logits,
        labels,
        {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()},
    )


def exact_loss(logits: Tensor, labels: Tensor, options: dict[str, Any], reduction: str) -> Tensor:
    offsets, weights = options.get("offsets"), options.get("weights")
    return F.cross_entropy(
        logits if offsets is None else logits + offsets.double(),
        labels,
        None if weights is None else weights.double(),
        label_smoothing=options.get("label_smoothing", 0.0),
        reduction=reduction,
    )


def assert_equals_cross_entropy(
    logits: Tensor, labels: Tensor, options: dict[str, Any], reduction: Any, backend: Any
) -> None:
    mine = logits.clone().requires_grad_()
    loss = class_loss(mine, labels, reduction=reduction, backend=backend, **options)
    exact = logits.double().requires_grad_()
    exact_value = exact_loss(exact, labels, options, reduction)
    assert loss.dtype == torch.float32
    # A sum of B losses is off by B times the rounding of one; a mean divides by the weights' sum.
    rows = 1 if reduction == "none" else len(logits)
    share = 1.0
    if reduction == "mean":
        weights = options.get("weights")
        share = 1 / (len(logits) if weights is None else weights[labels].sum().item())
    torch.testing.assert_close(
        loss.double(), exact_value, rtol=ROUNDING, atol=ROUNDING * rows * share
    )

    grad = torch.linspace(0.5, 2, loss.numel(), device=loss.device).view(loss.shape)
    loss.backward(grad)
    exact_value.backward(grad.double())
    assert mine.grad is not None and mine.grad.dtype == logits.dtype
    assert exact.grad is not None
    torch.testing.assert_close(
        mine.grad.double(),
        exact.grad,
        rtol=1.01 * UNIT[logits.dtype],
        atol=ROUNDING * share * grad.max().item() + SUBNORMAL,
    )


@everywhere
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_loss_and_gradient_equal_cross_entropy(
    batch: int, classes: int, reduction: str, options: str, backend: str, device: str
) -> None:
    logits, labels, values = make_batch(batch, classes, torch.float32, device, **OPTIONS[options])
    assert_equals_cross_entropy(logits, labels, values, reduction, backend)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_half_precision_logits_cost_one_rounding_of_the_gradient(
    batch: int, classes: int, dtype: torch.dtype, backend: str, device: str
) -> None:
    logits, labels, values = make_batch(batch, classes, dtype, device, **OPTIONS["all"])
    assert_equals_cross_entropy(logits, labels, values, "mean", backend)


@everywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", ["plain", "offsets and weights"])
@pytest.mark.parametrize(("batch", "classes"), SIZES)
def test_the_gradient_of_the_sum_alone_is_that_of_autograd_to_the_bit(
    batch: int, classes: int, options: str, dtype: torch.dtype, backend: Any, device: str
) -> None:
    wanted = {} if options == "plain" else {"offsets": True, "weights": True}
    logits, labels, values = make_batch(batch, classes, dtype, device, **wanted)
    leaf = logits.clone().requires_grad_()
    total = class_loss(leaf, labels, reduction="sum", backend=backend, **values)
    (gradient,) = torch.autograd.grad(total, leaf)
    found = class_loss_gradient(logits, labels, backend=backend, **values)
    assert found.dtype == dtype and torch.equal(found, gradient)
    turned = logits.t().contiguous().t()
    assert torch.equal(class_loss_gradient(turned, labels, backend=backend, **values), gradient)
    none = class_loss_gradient(logits[:0], labels[:0], backend=backend, **values)
    assert none.shape == (0, classes)


@everywhere
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_logits_of_any_size_give_the_loss_of_cross_entropy(
    backend: Any, device: str, data: st.DataObject
) -> None:
    batch, classes = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 40))
    value = st.integers(-10, 10) | st.sampled_from([-1e30, 1e30, -1e4, float("-inf")])
    row = st.lists(value, min_size=classes, max_size=classes)
    logits = torch.tensor(data.draw(st.lists(row, min_size=batch, max_size=batch)), device=device)
    labels = torch.tensor(
        data.draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch)),
        device=device,
    )
    logits = logits.float()
    losses = class_loss(logits, labels, reduction="none", backend=backend)
    # float32 input to both: 1e30 is another number in float64.
    exact = F.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(losses.double(), exact, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


@everywhere
def test_histogram_counts_the_first_maximum_of_the_raw_logits(backend: Any, device: str) -> None:
    nan, inf = float("nan"), float("inf")
    logits = torch.tensor(
        [
            [1, 3, 3, 2, 3],  # a tie: the first of the maxima
            [0, 0, 0, 0, 0],
            [-inf, -inf, -inf, -inf, -inf],
            [-1, -inf, -1, 0, 0],
            [5, nan, 9, nan, inf],  # as torch.argmax: a NaN is the greatest
            [0, 1, 2, 3, inf],
        ],
        device=device,
    )
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    histogram = torch.tensor([10, 20, 30, 40, 50], device=device)
    offsets = torch.tensor([0.0, 0, 100, 0, 0], device=device)
    class_loss(logits, labels, offsets=offsets, histogram=histogram, backend=backend)
    assert histogram.tolist() == [12, 22, 30, 41, 51]


@everywhere
def test_impossible_classes_have_probability_and_gradient_zero(backend: Any, device: str) -> None:
    inf = float("inf")
    logits = torch.tensor([[1.0, -inf, 2.0, 0.5], [1.0, 0.0, 0.0, 3.0]], device=device)
    offsets = torch.tensor([0.0, 1.0, -inf, 2.0], device=device)
    labels = torch.tensor([0, 3], device=device)
    assert_equals_cross_entropy(logits, labels, {"offsets": offsets}, "mean", backend)
    mine = logits.clone().requires_grad_()
    losses = class_loss(
        mine,
        torch.tensor([1, 2], device=device),
        offsets=offsets,
        reduction="none",
        backend=backend,
    )
    losses.sum().backward()
    assert losses.tolist() == [inf, inf]
    assert mine.grad is not None
    assert mine.grad[:, 2].tolist() == [0, -1] and mine.grad[0, 1] == -1


@everywhere
def test_offsets_far_beyond_the_logits_lose_nothing(backend: Any, device: str) -> None:
    # Sums of whole numbers: exact, and of a size that the exponentials of the logits are not.
    logits = torch.tensor([[300.0, 0.0, 1.0], [0.0, 1.0, 2.0], [-300.0, 3.0, 1.0]], device=device)
    labels = torch.tensor([0, 2, 1], device=device)
    for offset in (-300.0, 300.0):
        offsets = torch.tensor([offset, 0.0, 2.0], device=device)
        assert_equals_cross_entropy(logits, labels, {"offsets": offsets}, "mean", backend)


@everywhere
def test_weights_of_low_precision_are_summed_in_float32(backend: Any, device: str) -> None:
    logits, labels, _ = make_batch(300, 4, torch.float32, device)
    weights = torch.tensor([0.3, 1.7, 0.9, 1.1], device=device).bfloat16()
    assert_equals_cross_entropy(logits, labels, {"weights": weights}, "mean", backend)


@everywhere
def test_weights_that_are_zero_take_part_as_in_pytorch(backend: Any, device: str) -> None:
    logits, labels, _ = make_batch(9, 4, torch.float32, device)
    some = torch.tensor([0.0, 2.0, 0.0, 1.0], device=device)
    assert_equals_cross_entropy(logits, labels, {"weights": some}, "sum", backend)
    none = torch.zeros(4, device=device)
    for reduction, value in (("mean", float("nan")), ("sum", 0.0)):
        mine = logits.clone().requires_grad_()
        loss = class_loss(mine, labels, weights=none, reduction=reduction, backend=backend)  # type: ignore[arg-type]
        loss.backward()
        expected = torch.full_like(logits, value)
        assert mine.grad is not None
        torch.testing.assert_close(loss, expected[0, 0], equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(mine.grad, expected, equal_nan=True, rtol=0, atol=0)


@everywhere
def test_strided_inputs_are_read_as_they_are_meant(backend: Any, device: str) -> None:
    logits, labels, values = make_batch(6, 10, torch.float32, device, **OPTIONS["all"])
    poisoned = torch.full((12, 30), float("nan"), device=device)
    poisoned[2:8, 5:25:2] = logits
    wide = torch.full((6, 3), 10**12, device=device)
    wide[:, 1] = labels
    plain = class_loss(logits, labels, backend=backend, **values)
    for name in ("offsets", "weights"):
        spread = torch.full((10, 2), float("nan"), device=device)
        spread[:, 1] = values[name]
        values[name] = spread[:, 1]
    strided = class_loss(poisoned[2:8, 5:25:2], wide[:, 1], backend=backend, **values)
    assert torch.equal(plain, strided)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
def test_nothing_outside_the_logits_is_read_and_a_wrong_label_shows(device: str) -> None:
    logits, labels, _ = make_batch(5, 3, torch.float32, device)
    poisoned = torch.full((64,), float("nan"), device=device)
    poisoned[16 : 16 + 15] = logits.flatten()
    inside = poisoned[16 : 16 + 15].view(5, 3)
    rows = class_loss_rows(inside, labels, None, None, 0.1, True)
    assert all(values.isfinite().all() for values in rows)
    labels[2] = 3
    losses = class_loss(inside, labels, reduction="none", backend="triton")
    assert losses.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_formula_of_the_gradient_is_that_of_autograd(options: str) -> None:
    logits, labels, values = make_batch(11, 6, torch.float64, "cpu", **OPTIONS[options])
    smoothing = values.get("label_smoothing", 0.0)
    losses, gradient, predictions = class_loss_rows_torch(
        logits, labels, values.get("offsets"), values.get("weights"), smoothing, True
    )
    assert torch.equal(predictions, logits.argmax(1))  # whatever the offsets
    leaf = logits.clone().requires_grad_()
    exact = exact_loss(leaf, labels, values, "none")
    exact.sum().backward()
    assert leaf.grad is not None
    # Both float64: 1e-14 is some 50 roundings of numbers up to 1.
    torch.testing.assert_close(losses, exact.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-13, atol=1e-14)


def test_the_pytorch_form_passes_gradcheck_in_float64() -> None:
    logits, labels, values = make_batch(4, 5, torch.float64, "cpu", **OPTIONS["all"])
    assert torch.autograd.gradcheck(
        lambda z: class_loss(z, labels, **values), logits.requires_grad_()
    )


@pytest.mark.parametrize("options", OPTIONS)
def test_the_pytorch_form_neither_syncs_nor_has_shapes_that_depend_on_data(options: str) -> None:
    logits, labels, values = make_batch(6, 5, torch.float32, "cpu", **OPTIONS[options])
    histogram = torch.zeros(5, dtype=torch.int64)
    # A fake tensor has no values: whatever asks for one raises.
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in values.items()
        }
        logits, labels = mode.from_tensor(logits).requires_grad_(), mode.from_tensor(labels)
        loss = class_loss(logits, labels, histogram=mode.from_tensor(histogram), **values)
        loss.backward()
        assert logits.grad is not None and logits.grad.shape == (6, 5)


@everywhere
def test_transforms_and_plain_autograd_agree(backend: Any, device: str) -> None:
    logits, labels, values = make_batch(8, 10, torch.float32, device, **OPTIONS["all"])
    transformed = torch.func.grad(lambda z: class_loss(z, labels, backend=backend, **values))(
        logits
    )
    leaf = logits.clone().requires_grad_()
    class_loss(leaf, labels, backend=backend, **values).backward()
    assert leaf.grad is not None and torch.equal(transformed, leaf.grad)


@pytest.mark.interpreter
def test_the_gradient_is_computed_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return class_loss_rows(*arguments)

    monkeypatch.setattr(module, "class_loss_rows", spy)
    logits, labels, _ = make_batch(3, 4, torch.float32, "cpu")
    without = class_loss(logits, labels, backend="triton")
    leaf = logits.clone().requires_grad_()
    with torch.no_grad():
        class_loss(leaf, labels, backend="triton")
    wanted = class_loss(leaf, labels, backend="triton")
    assert asked == [False, False, True]
    assert not without.requires_grad and wanted.requires_grad and wanted.item() == without.item()


@pytest.mark.interpreter
def test_a_second_derivative_is_refused() -> None:
    logits, labels, _ = make_batch(3, 4, torch.float32, "cpu")
    logits.requires_grad_()
    # Of a square, where the part that autograd does know would pass for the whole.
    square = class_loss(logits, labels, backend="triton").square()
    (first,) = torch.autograd.grad(square, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("options", ["plain", "all"])
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_operator_is_registered_soundly(options: str, with_gradient: bool) -> None:
    logits, labels, values = make_batch(5, 4, torch.float32, "cpu", **OPTIONS[options])
    smoothing = values.get("label_smoothing", 0.0)
    arguments = (logits, labels, values.get("offsets"), values.get("weights"), smoothing)
    torch.library.opcheck(class_loss_rows, (*arguments, with_gradient))


def test_loss_and_operator_are_captured_in_one_graph() -> None:
    logits, labels, values = make_batch(5, 4, torch.float32, "cpu", **OPTIONS["all"])

    def step(logits: Tensor, labels: Tensor, histogram: Tensor) -> tuple[Tensor, Tensor]:
        loss = class_loss(logits, labels, histogram=histogram, **values)
        return loss, class_loss_rows(logits, labels, None, None, 0.0, True)[1]

    eager, compiled = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    expected = step(logits, labels, eager)
    results = torch.compile(step, backend="aot_eager", fullgraph=True)(logits, labels, compiled)
    assert torch.equal(eager, compiled) and eager.sum() == 5
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
def test_the_cuda_side_can_be_traced_without_a_gpu() -> None:
    with FakeTensorMode():
        logits = torch.empty(128, 100, dtype=torch.bfloat16, device="cuda")
        labels = torch.empty(128, dtype=torch.int64, device="cuda")
        losses, gradient, predictions = class_loss_rows(logits, labels, None, None, 0.0, True)
    assert (losses.shape, losses.dtype) == ((128,), torch.float32)
    assert (gradient.shape, gradient.dtype) == ((128, 100), torch.float32)
    assert (predictions.shape, predictions.dtype) == ((128,), torch.int64)
    assert {value.device.type for value in (losses, gradient, predictions)} == {"cuda"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": (torch.zeros(3, 4), None)}, r"logits: a tuple; a model has to give them alone"),
        ({"logits": torch.zeros(3)}, r"logits must be a filled \[B, C\] tensor"),
        ({"logits": torch.zeros(0, 4)}, r"logits must be a filled"),
        ({"logits": torch.zeros(3, 4, dtype=torch.int64)}, r"floats, got torch.int64"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels must be int64 of shape \[3\]"),
        ({"labels": torch.zeros(3)}, r"labels must be int64"),
        ({"offsets": torch.zeros(3)}, r"offsets must have shape \[4\]"),
        ({"weights": torch.zeros(4, 1)}, r"weights must have shape \[4\]"),
        ({"histogram": torch.zeros(5, dtype=torch.int64)}, r"histogram must have shape \[4\]"),
        ({"histogram": torch.zeros(4)}, r"histogram must be int64"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ({"reduction": "average"}, r"reduction='average' is unknown"),
        ({"backend": "cuda"}, r"backend='cuda' is unknown"),
        ({"logits": torch.zeros(3, 4).double(), "backend": "triton"}, r"give backend='torch'"),
        ({"logits": torch.zeros(3, 8193), "backend": "triton"}, r"up to 8192 classes"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(3, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        class_loss(**{**arguments, **change})

"""The tail penalty, in PyTorch and as kernels, against a plain loop and the published one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from old_triton import interprets_no_loop
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from reat_fast.kernels import tail_penalty as module
from reat_fast.kernels.tail_penalty import (
    Form,
    tail_penalty,
    tail_penalty_and_gradient,
    tail_penalty_and_gradient_torch,
)
from reat_fast.kernels.triton_support import TRITON_INSTALLED

PLACES = [
    pytest.param("torch", "cpu", id="torch"),
    pytest.param("triton", "cpu", id="interpreter", marks=pytest.mark.interpreter),
    pytest.param("triton", "cuda", id="gpu", marks=pytest.mark.gpu),
]
pytestmark = [
    # Rows beyond the batch pass through inf - inf.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    interprets_no_loop,
]
everywhere = pytest.mark.parametrize(("backend", "device"), PLACES)
both_forms = pytest.mark.parametrize("form", ["official", "pairwise"])

# Log-softmaxes here are below 2^5, so a softmax has a relative error of a few 2^-20; three TF32
# products, or one in float32, add less than that.
ROUNDING = 4 * 2.0**-20
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Half the smallest float16: what a gradient element may lose on top of its unit.
SUBNORMAL = 2.0**-25
# [B, D, C]: odd sizes, one sample, one feature, several tiles each way, many classes.
SIZES = [(1, 5, 10), (7, 1, 2), (13, 33, 10), (128, 40, 10), (70, 100, 100), (100, 65, 7)]


def make_batch(
    batch: int, width: int, classes: int, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch + width + classes)
    features = torch.randn(batch, width, generator=generator) * 2
    labels = torch.randint(classes, (batch,), generator=generator)
    labels[0] = classes - 1  # never without a tail sample
    counts = torch.randint(1, 5000, (classes,), generator=generator)
    return features.to(device), labels.to(device), counts.to(device)


def loop(
    features: Tensor, labels: Tensor, counts: Tensor, form: Form, coefficient: float
) -> tuple[Tensor, Tensor]:
    """Compute the penalty pair by pair in float64, and the weight |W| that rounding is met with."""
    features, (batch, width), classes = features.double(), features.shape, len(counts)
    samples = [max(count, 1) for count in counts.tolist()]
    value = [(sum(samples) / count) ** 0.5 for count in samples]
    first_tail = classes // 3 * 2 + 1
    anchors = [i for i in range(batch) if labels[i] >= first_tail]
    log_softmax = features.log_softmax(1)
    penalty, weight = features.sum() * 0, torch.zeros(())
    for i in anchors:
        fixed = log_softmax[i].detach()
        pairs, divergences = [], []
        for j in range(batch):
            sign = -1 if labels[i] == labels[j] else 1
            pairs.append(sign * (value[int(labels[i])] + value[int(labels[j])]))
            divergences.append((fixed.exp() * (fixed - log_softmax[j])).sum())
        if form == "official":
            pairs = [sum(pairs) / batch / width] * batch
        for pair, divergence in zip(pairs, divergences, strict=True):
            scaled = coefficient * pair / batch / len(anchors)
            penalty = penalty + scaled * divergence
            weight += abs(scaled)
    return penalty, weight


def assert_equals_loop(
    features: Tensor, labels: Tensor, counts: Tensor, form: Form, backend: Any
) -> None:
    coefficient, mine = 0.7, features.clone().requires_grad_()
    penalty = tail_penalty(
        mine, labels, counts, form=form, coefficient=coefficient, backend=backend
    )
    penalty.backward(torch.tensor(3.0, device=features.device))
    exact = features.double().cpu().requires_grad_()
    value, weight = loop(exact, labels.cpu(), counts.cpu(), form, coefficient)
    (exact_gradient,) = torch.autograd.grad(value * 3, exact)
    assert penalty.shape == () and penalty.dtype == torch.float32
    # A divergence is a mean of differences of log-softmaxes, each difference below their span.
    log_softmax = exact.detach().log_softmax(1)
    span = (log_softmax - log_softmax[0]).abs().max().item()
    error = ROUNDING * weight.item()
    torch.testing.assert_close(
        penalty.detach().double().cpu(), value.detach(), rtol=0, atol=error * span
    )
    assert mine.grad is not None and mine.grad.dtype == features.dtype
    torch.testing.assert_close(
        mine.grad.double().cpu(),
        exact_gradient,
        rtol=1.01 * UNIT[features.dtype],
        atol=3 * error + (SUBNORMAL if features.dtype == torch.float16 else 0),
    )


@everywhere
@both_forms
@pytest.mark.parametrize(("batch", "width", "classes"), SIZES)
def test_penalty_and_gradient_equal_the_loop(
    batch: int, width: int, classes: int, form: Form, backend: str, device: str
) -> None:
    features, labels, counts = make_batch(batch, width, classes, device)
    assert_equals_loop(features, labels, counts, form, backend)


@everywhere
@both_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_cost_one_rounding_of_the_gradient(
    dtype: torch.dtype, form: Form, backend: str, device: str
) -> None:
    features, labels, counts = make_batch(20, 48, 10, device)
    assert_equals_loop(features.to(dtype), labels, counts, form, backend)


@everywhere
@both_forms
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_batch_gives_the_penalty_of_the_loop(
    form: Form, backend: str, device: str, data: st.DataObject
) -> None:
    batch, width = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 9))
    classes = data.draw(st.integers(1, 12))
    rows = st.lists(st.integers(-6, 6), min_size=width, max_size=width)
    features = torch.tensor(data.draw(st.lists(rows, min_size=batch, max_size=batch)))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch))
    counts = data.draw(st.lists(st.integers(-1, 10**6), min_size=classes, max_size=classes))
    assert_equals_loop(
        features.float().to(device),
        torch.tensor(labels, device=device),
        torch.tensor(counts, device=device),
        form,
        backend,
    )


def published_loop(features: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Follow the published loop: one scalar divergence an anchor, then signs and weights."""
    divergence = nn.KLDivLoss(reduction="mean")
    values = (1 / (counts / counts.sum())).sqrt()
    tail = range(len(counts) // 3 * 2 + 1, len(counts))
    anchors = [i for i in range(len(labels)) if int(labels[i]) in tail]
    total = torch.zeros(len(labels), dtype=features.dtype)
    for i in anchors:
        target = features[i].detach().softmax(0).expand(len(labels), -1)
        signs = torch.tensor([-1.0 if label == labels[i] else 1.0 for label in labels])
        total = total + divergence(features.log_softmax(1), target) * signs * (
            values[labels[i]] + values[labels]
        )
    return total.mean() / len(anchors)


@everywhere
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides:UserWarning")
@pytest.mark.parametrize("classes", [10, 100])
def test_the_official_form_equals_the_published_loop(
    classes: int, backend: Any, device: str
) -> None:
    features, labels, counts = make_batch(64, 32, classes, device)
    mine = features.clone().requires_grad_()
    penalty = tail_penalty(mine, labels, counts, backend=backend)
    penalty.backward()
    exact = features.double().cpu().requires_grad_()
    value = published_loop(exact, labels.cpu(), counts.cpu().double())
    value.backward()
    assert mine.grad is not None and exact.grad is not None
    _, weight = loop(features.cpu(), labels.cpu(), counts.cpu(), "official", 1.0)
    log_softmax = features.double().log_softmax(1)
    span = (log_softmax - log_softmax[0]).abs().max().item()
    error = ROUNDING * weight.item()
    torch.testing.assert_close(
        penalty.detach().double().cpu(), value.detach(), rtol=0, atol=error * span
    )
    torch.testing.assert_close(
        mine.grad.double().cpu(), exact.grad, rtol=UNIT[torch.float32], atol=error
    )


@everywhere
@both_forms
@pytest.mark.parametrize(
    ("classes", "labels"),
    [
        pytest.param(10, [0, 3, 6, 6, 2], id="no sample of a tail class"),
        pytest.param(3, [0, 1, 2, 2, 1], id="three classes have no tail"),
        pytest.param(1, [0, 0, 0, 0, 0], id="a single class is no tail"),
        pytest.param(10, [9], id="a sample alone has no pair"),
    ],
)
def test_penalty_is_exactly_zero_without_a_pair_of_a_tail_sample(
    classes: int, labels: list[int], form: Form, backend: Any, device: str
) -> None:
    features = make_batch(len(labels), 12, classes, device)[0].requires_grad_()
    targets = torch.tensor(labels, device=device)
    penalty = tail_penalty(
        features, targets, torch.arange(classes, device=device), form=form, backend=backend
    )
    penalty.backward()
    assert penalty.item() == 0
    # A lone anchor's p minus itself: softmax times W less W times softmax, each rounded once.
    assert features.grad is not None
    assert features.grad.abs().max().item() <= (1e-6 if labels == [9] else 0)


@everywhere
@both_forms
@pytest.mark.parametrize("labels", [[9, 9, 9, 9], [7, 8, 9, 7], [2, 9, 2, 9]])
def test_one_class_only_tail_and_repeated_classes_equal_the_loop(
    labels: list[int], form: Form, backend: Any, device: str
) -> None:
    features, _, counts = make_batch(4, 20, 10, device)
    assert_equals_loop(features, torch.tensor(labels, device=device), counts, form, backend)


@everywhere
@both_forms
def test_a_class_of_no_training_images_counts_as_one_of_a_single_one(
    form: Form, backend: Any, device: str
) -> None:
    features, _, counts = make_batch(6, 20, 10, device)
    counts[8] = 0
    labels = torch.tensor([8, 9, 8, 0, 8, 2], device=device)
    assert_equals_loop(features, labels, counts, form, backend)


@everywhere
@both_forms
def test_equal_features_give_zero_and_huge_features_stay_finite(
    form: Form, backend: Any, device: str
) -> None:
    features, labels, counts = make_batch(9, 30, 10, device)
    equal = features[:1].expand(9, 30)
    assert tail_penalty(equal, labels, counts, form=form, backend=backend).item() == 0
    zeros = torch.zeros_like(features)
    assert tail_penalty(zeros, labels, counts, form=form, backend=backend).item() == 0
    # Softmaxes that are 0 or 1 exactly: the logarithms, of size 1e4 and more, keep 24 bits.
    huge = (features * 1e4).requires_grad_()
    penalty = tail_penalty(huge, labels, counts, form=form, backend=backend)
    penalty.backward()
    value, weight = loop(huge.detach().cpu(), labels.cpu(), counts.cpu(), form, 1.0)
    error = 8 * UNIT[torch.float32] * weight.item() * huge.detach().abs().max().item()
    torch.testing.assert_close(penalty.detach().double().cpu(), value, rtol=0, atol=error)
    assert huge.grad is not None and huge.grad.isfinite().all()


@both_forms
def test_the_pytorch_forms_pass_gradcheck_with_their_anchors_held_fixed(form: Form) -> None:
    features, labels, counts = make_batch(5, 4, 7)
    features, fixed = features.double().requires_grad_(), features.double()

    def moving_rows_only(moving: Tensor) -> Tensor:
        """Hold the anchors of `fixed` against the rows of `moving`."""
        log_softmax = moving.log_softmax(1)
        _, mixed, _ = module._fixed_part(fixed.log_softmax(1), labels, counts, form, 1.0)
        return -(mixed * log_softmax).sum()

    assert torch.autograd.gradcheck(moving_rows_only, features)
    (expected,) = torch.autograd.grad(moving_rows_only(features), features)
    (gradient,) = torch.autograd.grad(tail_penalty(features, labels, counts, form=form), features)
    # Both float64; gradients of size 1 and less.
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@both_forms
def test_the_formula_of_the_gradient_is_that_of_autograd(form: Form) -> None:
    features, labels, counts = make_batch(11, 6, 7)
    leaf = features.double().requires_grad_()
    penalty = tail_penalty(leaf, labels, counts, form=form, coefficient=0.3)
    (expected,) = torch.autograd.grad(penalty, leaf)
    value, gradient = tail_penalty_and_gradient_torch(
        features.double(), labels, counts, form, 0.3, True
    )
    # Both float64; 1e-14 is some 50 roundings of numbers up to 1.
    torch.testing.assert_close(value, penalty.detach(), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=1e-13, atol=1e-14)


@both_forms
def test_autocast_does_not_reach_the_product(form: Form) -> None:
    features, labels, counts = make_batch(16, 24, 10)
    expected = tail_penalty(features, labels, counts, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tail_penalty(features, labels, counts, form=form), expected)


@both_forms
def test_the_pytorch_form_neither_syncs_nor_has_shapes_that_depend_on_data(form: Form) -> None:
    # A fake tensor has no values: whatever asks for one raises.
    with FakeTensorMode() as mode:
        features, labels, counts = (mode.from_tensor(value) for value in make_batch(6, 5, 10))
        features.requires_grad_()
        tail_penalty(features, labels, counts, form=form).backward()
        assert features.grad is not None and features.grad.shape == (6, 5)


@everywhere
@both_forms
def test_strided_inputs_are_read_as_they_are_meant(form: Form, backend: Any, device: str) -> None:
    features, labels, counts = make_batch(9, 10, 10, device)
    poisoned = torch.full((13, 30), float("nan"), device=device)
    poisoned[2:11, 5:25:2] = features
    wide = torch.full((9, 3), 10**12, device=device)
    wide[:, 1] = labels
    plain = tail_penalty(features, labels, counts, form=form, backend=backend)
    strided = tail_penalty(poisoned[2:11, 5:25:2], wide[:, 1], counts, form=form, backend=backend)
    assert torch.equal(plain, strided)


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.interpreter),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
@both_forms
def test_nothing_outside_the_features_is_read_and_a_wrong_label_shows(
    form: Form, device: str
) -> None:
    features, labels, counts = make_batch(5, 7, 10, device)
    poisoned = torch.full((128,), float("nan"), device=device)
    poisoned[32 : 32 + 35] = features.flatten()
    inside = poisoned[32 : 32 + 35].view(5, 7)
    penalty, gradient = tail_penalty_and_gradient(inside, labels, counts, form, 1.0, True)
    assert penalty.isfinite() and gradient.isfinite().all()
    labels[2] = 10
    assert tail_penalty(inside, labels, counts, form=form, backend="triton").isnan()


@everywhere
@both_forms
def test_transforms_and_plain_autograd_agree(form: Form, backend: Any, device: str) -> None:
    features, labels, counts = make_batch(8, 10, 10, device)
    leaf = features.clone().requires_grad_()
    tail_penalty(leaf, labels, counts, form=form, backend=backend).backward()
    transformed = torch.func.grad(
        lambda f: tail_penalty(f, labels, counts, form=form, backend=backend)
    )(features)
    assert leaf.grad is not None and torch.equal(transformed, leaf.grad)


class LargestTensor(TorchDispatchMode):
    """Remember the number of elements of the largest tensor any operator returns."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


@pytest.mark.interpreter
@both_forms
def test_the_kernels_never_hold_a_tensor_of_pairs(form: Form) -> None:
    features, labels, counts = make_batch(200, 40, 10)
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        tail_penalty(features.requires_grad_(), labels, counts, form=form, backend="triton")
    assert largest.elements == 200 * 40


@pytest.mark.interpreter
@both_forms
def test_block_sizes_do_not_change_the_result(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, counts = make_batch(300, 96, 10)
    expected, expected_gradient = tail_penalty_and_gradient_torch(
        features.double(), labels, counts, form, 1.0, True
    )
    for name, size in (("ELEMENTS", 1 << 15), ("PAIRS", 128), ("FEATURES", 64), ("ANCHORS", 128)):
        monkeypatch.setattr(module, f"BLOCK_{name}", size)
    penalty, gradient = tail_penalty_and_gradient(features, labels, counts, form, 1.0, True)
    # As in assert_equals_loop, with |W| taken as twice the mean class value, below 100.
    torch.testing.assert_close(penalty.double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(
        gradient.double(),
        expected_gradient,
        rtol=0,
        atol=ROUNDING * expected_gradient.abs().max().item(),
    )


@pytest.mark.interpreter
@both_forms
def test_the_gradient_is_computed_only_where_it_is_wanted(
    form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def spy(*arguments: Any) -> Any:
        asked.append(arguments[-1])
        return tail_penalty_and_gradient(*arguments)

    monkeypatch.setattr(module, "tail_penalty_and_gradient", spy)
    features, labels, counts = make_batch(6, 5, 10)
    without = tail_penalty(features, labels, counts, form=form, backend="triton")
    leaf = features.clone().requires_grad_()
    with torch.no_grad():
        tail_penalty(leaf, labels, counts, form=form, backend="triton")
    wanted = tail_penalty(leaf, labels, counts, form=form, backend="triton")
    assert asked == [False, False, True]
    assert not without.requires_grad and wanted.requires_grad and wanted.item() == without.item()


@pytest.mark.interpreter
def test_a_second_derivative_is_refused() -> None:
    features, labels, counts = make_batch(6, 5, 10)
    features.requires_grad_()
    # Of a square, where the part that autograd does know would pass for the whole.
    square = tail_penalty(features, labels, counts, backend="triton").square()
    (first,) = torch.autograd.grad(square, features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@both_forms
@pytest.mark.parametrize("with_gradient", [True, False])
def test_the_operator_is_registered_soundly(form: Form, with_gradient: bool) -> None:
    torch.library.opcheck(
        tail_penalty_and_gradient, (*make_batch(6, 5, 10), form, 0.5, with_gradient)
    )


@both_forms
def test_penalty_and_operator_are_captured_in_one_graph(form: Form) -> None:
    def step(features: Tensor, labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        penalty = tail_penalty(features, labels, counts, form=form)
        return penalty, tail_penalty_and_gradient(features, labels, counts, form, 1.0, True)[1]

    batch = make_batch(6, 5, 10)
    results = torch.compile(step, backend="aot_eager", fullgraph=True)(*batch)
    for result, expected in zip(results, step(*batch), strict=True):
        assert torch.equal(result, expected)


@pytest.mark.skipif(not TRITON_INSTALLED, reason="needs Triton")
@both_forms
def test_the_cuda_side_can_be_traced_without_a_gpu(form: Form) -> None:
    with FakeTensorMode():
        features = torch.empty(128, 512, dtype=torch.bfloat16, device="cuda")
        labels = torch.empty(128, dtype=torch.int64, device="cuda")
        counts = torch.empty(10, dtype=torch.int64, device="cuda")
        penalty, gradient = tail_penalty_and_gradient(features, labels, counts, form, 1.0, True)
    assert (penalty.shape, penalty.dtype) == ((), torch.float32)
    assert (gradient.shape, gradient.dtype) == ((128, 512), torch.float32)
    assert penalty.device.type == gradient.device.type == "cuda"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.zeros(3)}, r"features must be a filled \[B, D\] tensor"),
        ({"features": torch.zeros(0, 4)}, r"features must be a filled"),
        ({"features": torch.zeros(3, 4, dtype=torch.int64)}, r"floats, got torch.int64"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, r"labels must be int64 of shape \[3\]"),
        ({"labels": torch.zeros(3)}, r"labels must be int64"),
        ({"counts": torch.zeros(3, 1)}, r"counts must have shape \[C\]"),
        ({"form": "both"}, r"form='both' is unknown"),
        ({"backend": "cuda"}, r"backend='cuda' is unknown"),
        ({"features": torch.zeros(3, 4).double(), "backend": "triton"}, r"give backend='torch'"),
        ({"features": torch.zeros(3, 8193), "backend": "triton"}, r"up to 8192 columns"),
    ],
)
def test_wrong_arguments_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(3, 4),
        "labels": torch.zeros(3, dtype=torch.int64),
        "counts": torch.ones(10),
    }
    with pytest.raises(ValueError, match=message):
        tail_penalty(**{**arguments, **change})

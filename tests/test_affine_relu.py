"""Sum, constant BatchNorm and ReLU in one op against float64, and what is rewritten as it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from test_frozen import assert_equal_to_rounding, with_statistics
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reat_fast.kernels.affine_relu import TILE, WIDEST, affine_relu, affine_relu_linked
from reat_fast.kernels.triton_support import Backend
from reat_fast.models import create_model
from reat_fast.networks import frozen as frozen_module
from reat_fast.networks.architectures import Network
from reat_fast.networks.frozen import Form, FrozenNetwork
from reat_fast.networks.fused_relus import fuse_relus

Place = tuple[Backend, str]
Given = tuple[Tensor, Tensor, Tensor, Tensor | None]

SHAPES = [
    (2, 160, 3, 5),  # several tiles side by side
    (3, 64, 9, 7),
    (2, 37, 5, 3),  # no 16 bytes
    (1, WIDEST + 2, 2, 2),
    (2, 1, 3, TILE),
    (4, 24, 1, 1),
    (1, 1, 1, 1),
]
LOW = [torch.float32, torch.bfloat16, torch.float16]


def made(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, integers: bool = False
) -> tuple[Given, Tensor, Tensor]:
    """Return x, scale, shift and residual, and the gradients of the output and of the sum."""
    torch.manual_seed(sum(shape))
    draw: Callable[..., Tensor] = partial(torch.randint, -4, 5) if integers else torch.randn
    maps = [draw(shape).to(device, dtype) for _ in range(4)]
    x, residual, grad, other = (t.contiguous(memory_format=torch.channels_last) for t in maps)
    wide = torch.promote_types(dtype, torch.float32)
    scale, shift = (draw((shape[1],)).to(device, wide) for _ in range(2))
    return (x, scale, shift, residual), grad, other


def both_ways(
    given: Given, grad: Tensor | None, other: Tensor | None, backend: Backend
) -> tuple[Tensor, ...]:
    """Return y, s where `other` is its gradient, and the gradients of x and residual."""
    x, scale, shift, residual = given
    leaves = [t.detach().requires_grad_() for t in (x, residual) if t is not None]
    arguments = (leaves[0], scale, shift, leaves[1] if residual is not None else None)
    if other is None:
        outputs: tuple[Tensor, ...] = (affine_relu(*arguments, backend=backend),)
    else:
        outputs = affine_relu_linked(*arguments, backend=backend)
    sent = [(a, b) for a, b in zip(outputs, (grad, other), strict=False) if b is not None]
    gradients = torch.autograd.grad([a for a, _ in sent], leaves, [b for _, b in sent])
    return *(output.detach() for output in outputs), *gradients


def exact(given: Given, grad: Tensor, other: Tensor | None, mask: Tensor) -> list[Tensor]:
    """Compute the same in float64 by formulas written without the op.

    mask: where the gradient passes, as rounding may decide that.
    """
    x, scale, shift, residual = given
    total = x if residual is None else x + residual
    wide = [t.double().view(1, -1, 1, 1) for t in (scale, shift)]
    before = wide[0] * total.double() + wide[1]
    gradient = torch.where(mask, wide[0] * grad.double(), 0)
    if other is not None:
        gradient = gradient + other.double()
    results = [torch.where(before <= 0, 0, before)]
    results += [] if other is None else [total.double()]
    return results + [gradient] * (1 if residual is None else 2)


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", [*LOW, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_float64_rounded(
    place: Place, shape: tuple[int, ...], dtype: torch.dtype, summed: bool, linked: bool
) -> None:
    backend, device = place
    (x, scale, shift, residual), grad, other = made(shape, dtype, device)
    given = (x, scale, shift, residual if summed else None)
    found = both_ways(given, grad, other if linked else None, backend)
    wanted = exact(given, grad, other if linked else None, found[0] > 0)
    # Rounded once, by half of eps, after a product and a sum in float32; where those cancel, an
    # error of float32 is left of summands up to some 4 * 4.
    eps = torch.finfo(dtype).eps
    atol = 16 * (eps if dtype == torch.float64 else 2.0**-23) + torch.finfo(dtype).tiny
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype and a.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(a.double(), b, rtol=0.51 * eps, atol=atol)


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(2, 40, 5, 4), (3, 7, 6, 6)])
def test_integers_are_exact(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    backend, device = place
    given, grad, other = made(shape, dtype, device, integers=True)
    found = both_ways(given, grad, other, backend)
    wanted = exact(given, grad, other, found[0] > 0)
    assert all(torch.equal(a.double(), b) for a, b in zip(found, wanted, strict=True))
    assert (found[0] == 0).any() and (found[0] > 0).any() or found[0].numel() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_is_rounded_before_it_is_scaled(place: Place, dtype: torch.dtype) -> None:
    backend, device = place
    (x, scale, shift, residual), _, _ = made((2, 64, 5, 7), dtype, device)
    output, total = affine_relu_linked(x, scale, shift, residual, backend=backend)
    assert residual is not None and torch.equal(total, x + residual)
    assert torch.equal(output, affine_relu(x, scale, shift, residual, backend=backend))
    assert torch.equal(output, affine_relu(total, scale, shift, backend=backend))


@pytest.mark.parametrize("summed", [False, True])
def test_nan_passes_and_both_zeros_stop_the_gradient(place: Place, summed: bool) -> None:
    backend, device = place
    x = torch.tensor([torch.nan, -0.0, 0.0, 2.0], device=device).view(1, 4, 1, 1)
    x = x.expand(1, 4, 2, 2).contiguous(memory_format=torch.channels_last)
    scale, shift = torch.full((4,), 3.0, device=device), torch.full((4,), -0.0, device=device)
    given = (x, scale, shift, -torch.zeros_like(x) if summed else None)
    found = both_ways(given, torch.ones_like(x), torch.full_like(x, 5.0), backend)
    assert found[0][0, :, 0, 0].nan_to_num(7).tolist() == [7, 0, 0, 6]
    for gradient in found[2:]:
        assert gradient[0, :, 1, 1].tolist() == [8, 5, 5, 8]
    (alone, *_) = both_ways(given, torch.ones_like(x), None, backend)[1:]
    assert alone[0, :, 1, 1].tolist() == [3, 0, 0, 3]


def test_nan_stays_in_its_element(place: Place) -> None:
    backend, device = place
    (x, scale, shift, residual), grad, other = made((2, 37, 4, 3), torch.float32, device)
    x[1, 36, 3, 2] = torch.nan
    output, total, gradient, _ = both_ways((x, scale, shift, residual), grad, other, backend)
    assert output.isnan().nonzero().tolist() == total.isnan().nonzero().tolist() == [[1, 36, 3, 2]]
    assert not gradient.isnan().any()


@pytest.mark.parametrize("linked", [False, True])
def test_a_reader_that_sends_no_gradient_back_costs_none(place: Place, linked: bool) -> None:
    backend, device = place
    (x, scale, shift, residual), grad, other = made((2, 16, 3, 3), torch.float32, device)
    given = (x, scale, shift, residual)
    if linked:
        alone = both_ways(given, None, other, backend)
        assert torch.equal(alone[2], other) and torch.equal(alone[3], other)
    leaf = x.detach().requires_grad_()
    output, _ = affine_relu_linked(leaf, scale, shift, residual, backend=backend)
    (found,) = torch.autograd.grad(output, leaf, grad)  # and none for the residual
    assert torch.equal(found, both_ways(given, grad, None, backend)[1])


@pytest.mark.parametrize("layout", ["contiguous", "strided", "spread", "mixed"])
def test_maps_in_other_layouts_are_taken_too(place: Place, layout: str) -> None:
    backend, device = place
    given, grad, other = made((3, 12, 4, 4), torch.float32, device)
    maps = [given[0], given[3], grad, other]
    for index, tensor in enumerate(maps):
        assert tensor is not None
        if layout == "contiguous" or (layout == "mixed" and index % 2):
            maps[index] = tensor.contiguous()
        elif layout == "strided":
            room = torch.full((3, 12, 4, 9), torch.nan, device=device)
            room[..., ::2][..., :4] = tensor
            maps[index] = room[..., ::2][..., :4]
        elif layout == "spread":
            maps[index] = tensor[:, :, :1, :1].expand(3, 12, 4, 4)
    x, residual, grad, other = maps  # type: ignore[assignment]
    changed = (x, given[1], given[2], residual)
    found = both_ways(changed, grad, other, backend)  # type: ignore[arg-type]
    for a, b in zip(found, exact(changed, grad, other, found[0] > 0), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a.double(), b, rtol=2.0**-23, atol=2.0**-19)


def test_a_residual_that_is_not_like_x_is_added_as_pytorch_does(place: Place) -> None:
    backend, device = place
    (x, scale, shift, _), grad, other = made((3, 12, 4, 4), torch.float32, device)
    for residual in (x[:1, :, :1], x[:, :1].double(), 0.5):
        leaf = x.detach().requires_grad_()
        found = affine_relu_linked(leaf, scale, shift, residual, backend=backend)  # type: ignore[arg-type]
        total = x + residual
        assert torch.equal(found[1], total)
        assert torch.equal(found[0], affine_relu(total, scale, shift, backend=backend))
        sent = grad.to(total.dtype), other.to(total.dtype)
        (gradient,) = torch.autograd.grad(found, leaf, sent)
        wanted = both_ways((total, scale, shift, None), *sent, backend)[-1]
        assert torch.equal(gradient, wanted.to(x.dtype))


def test_what_has_no_elements_is_taken(place: Place) -> None:
    backend, device = place
    given, grad, other = made((0, 8, 3, 3), torch.bfloat16, device)
    found = both_ways(given, grad, other, backend)
    assert [tuple(t.shape) for t in found] == [(0, 8, 3, 3)] * 4


@pytest.mark.parametrize("name", ["scale", "shift"])
def test_a_scale_that_asks_for_a_gradient_is_refused(name: str) -> None:
    (x, scale, shift, _), _, _ = made((2, 4, 3, 3), torch.float32, "cpu")
    {"scale": scale, "shift": shift}[name].requires_grad_()
    with pytest.raises(ValueError, match="no gradient for scale and shift"):
        affine_relu(x, scale, shift)


def test_a_scale_that_does_not_fit_is_refused(place: Place) -> None:
    backend, device = place
    (x, scale, shift, _), _, _ = made((2, 4, 3, 3), torch.float32, device)
    with pytest.raises(RuntimeError):
        affine_relu(x, scale[:3], shift, backend=backend)


def test_a_second_derivative_is_refused() -> None:
    (x, scale, shift, _), _, _ = made((2, 4, 3, 3), torch.float32, "cpu")
    leaf = x.requires_grad_()
    output = affine_relu(leaf, scale, shift)
    (gradient,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_ways_can_be_captured(dtype: torch.dtype) -> None:
    given, grad, other = made((128, 160, 8, 8), dtype, "cuda")
    wanted = both_ways(given, grad, other, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        both_ways(given, grad, other, "triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = both_ways(given, grad, other, "triton")
    for tensor in found:
        tensor.fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def rewriting(monkeypatch: pytest.MonkeyPatch) -> Form:
    """Return a form that rewrites as "triton" does, by PyTorch's operators on a CPU."""
    rewritten = partial(fuse_relus, preactivations=True)
    monkeypatch.setattr(
        frozen_module, "fuse_relus", lambda own, backend, preactivations: rewritten(own, backend)
    )
    return "cudnn"


def nodes(frozen: FrozenNetwork) -> list[fx.Node]:
    """Return the calls of the op, in order."""
    assert isinstance(frozen._copy, fx.GraphModule)
    wanted = (affine_relu, affine_relu_linked)
    return [node for node in frozen._copy.graph.nodes if node.target in wanted]


def kinds(frozen: FrozenNetwork) -> list[tuple[bool, bool]]:
    """Say of each call whether it sums, and whether its sum has another reader."""
    return [(n.args[3] is not None, n.target is affine_relu_linked) for n in nodes(frozen)]


ALONE, LINKED, SUM, LINKED_SUM = (False, False), (False, True), (True, False), (True, True)
NETWORKS = {
    # The first reads the stem, which the first block of one adds as well; the other's is folded.
    "preact_resnet18": [LINKED, LINKED_SUM, *[SUM, LINKED_SUM] * 3, SUM],
    "wrn28_10": [*[LINKED_SUM] * 3, *[SUM, *[LINKED_SUM] * 3] * 2, SUM],
}


def narrow(name: str, dtype: torch.dtype = torch.float64) -> Network:
    torch.manual_seed(1)
    model = create_model(name, 6, width=8)
    with_statistics(model)
    return model.to(dtype)


def change_(model: nn.Module) -> None:
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_rewritten_and_follow_their_weights_in_the_same_memory(
    name: str, rewriting: Form
) -> None:
    model = narrow(name)
    frozen = FrozenNetwork(model, form=rewriting)
    assert kinds(frozen) == NETWORKS[name]
    assert frozen.unfolded == FrozenNetwork(model, form="eager").unfolded
    assert len(frozen._affines) == len(frozen.unfolded) == len(NETWORKS[name])
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen._copy.modules())
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    assert_equal_to_rounding(frozen, model, images)
    places = [(a.scale.data_ptr(), a.shift.data_ptr()) for a in frozen._affines]
    change_(model)
    frozen.refresh()
    assert_equal_to_rounding(frozen, model, images)
    assert places == [(a.scale.data_ptr(), a.shift.data_ptr()) for a in frozen._affines]
    named = dict(frozen._copy.named_buffers())
    first = nodes(frozen)[0].args[1]
    assert isinstance(first, fx.Node) and named[str(first.target)] is frozen._affines[0].scale


def test_triton_rewrites_and_other_forms_do_not(device: str) -> None:
    model = narrow("preact_resnet18", torch.float32).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(2, 3, 16, 16, device=device)
    cudnn, triton = (FrozenNetwork(model, torch.bfloat16, form) for form in ("cudnn", "triton"))  # type: ignore[arg-type]
    assert nodes(cudnn) == [] and kinds(triton) == NETWORKS["preact_resnet18"]
    leaves = [images.clone().requires_grad_() for _ in range(3)]
    logits = [network(x) for network, x in zip((cudnn, triton, model.eval()), leaves, strict=True)]
    gradients = [
        torch.autograd.grad(y.float().square().sum(), x)[0]
        for y, x in zip(logits, leaves, strict=True)
    ]
    for found in ([y.detach() for y in logits], gradients):
        before, after = (float((t - found[2]).norm() / found[2].norm()) for t in found[:2])
        # Both round some twenty layers to bfloat16; the one that rounds less is no further off
        # but by chance.
        assert 0 < after < 1.5 * before < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_are_in_float32_or_the_precision_of_the_network(
    dtype: torch.dtype, rewriting: Form
) -> None:
    for precision, wanted in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        model = narrow("preact_resnet18", precision)
        frozen = FrozenNetwork(model, dtype, rewriting)
        assert {t.dtype for a in frozen._affines for t in (a.scale, a.shift)} == {wanted}
        found, expected = frozen(torch.rand(2, 3, 8, 8)), narrow("preact_resnet18").eval()
        assert found.dtype == dtype and found.isfinite().all()
        first = frozen._affines[0]
        norm: Any = expected.get_submodule(frozen.unfolded[0])
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        tolerance = 0.02 if precision == torch.bfloat16 else 1e-6  # three roundings by 2^-9
        torch.testing.assert_close(first.scale.double(), scale, rtol=tolerance, atol=tolerance)


class Varied(nn.Module):
    """One BatchNorm before a ReLU, in many places, most of which look like those that are taken."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        plain = place not in ("without weight", "without statistics")
        statistics = place != "without statistics"
        self.norm = nn.BatchNorm2d(8, affine=plain, track_running_stats=statistics, momentum=None)
        self.relu = nn.ReLU(inplace=place == "in place")

    def forward(self, images: Tensor) -> Tensor:
        u, v, w = (conv(images) for conv in self.convs)
        match self.place:
            case "read alone":
                return self._mean(self.relu(self.norm((images * 2).abs())))
            case "sum" | "in place" | "without weight" | "without statistics":
                return self._mean(self.relu(self.norm(u + v)))
            case "sum by a function":
                return self._mean(torch.relu(self.norm(torch.add(u, v))))
            case "sum by a method":
                return self._mean(self.norm(u.add(v)).relu())
            case "read again":
                total = u + v
                return self._mean(self.convs[0](self.relu(self.norm(total))) + total)
            case "read again before":
                total = u + v
                early = total + w
                return self._mean(self.relu(self.norm(total)) + early)
            case "read by the average":
                total = u + v
                return self._mean(self.relu(self.norm(total))) + self._mean(total)
            case "written":
                total = u + v
                total += w
                return self._mean(self.relu(self.norm(total)))
            case "written by another name":
                total = u + v
                same = total.view_as(total)
                same += 1
                return self._mean(self.relu(self.norm(total)))
            case "doubled":
                return self._mean(self.relu(self.norm(u + u)))
            case "scaled":
                return self._mean(self.relu(self.norm(torch.add(u, v, alpha=2))))
            case "with a number":
                return self._mean(self.relu(self.norm(u + 0.5)))
            case "spread":
                return self._mean(self.relu(self.norm(u + v[:, :, :1])))
            case "norm read twice":
                normal = self.norm(u + v)
                return self._mean(self.relu(normal) + normal)
            case "twice":
                return self._mean(self.relu(self.norm(u + v)) + self.relu(self.norm(v + w)))
            case "twice, once without":
                return self._mean(self.relu(self.norm(u + v)) + self.norm(v + w))
            case _:
                return self._mean(F.gelu(self.norm(u + v)))

    def _mean(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


@pytest.mark.parametrize(
    ("place_in_network", "wanted"),
    [
        ("read alone", [ALONE]),
        ("sum", [SUM]),
        ("in place", [SUM]),
        ("sum by a function", [SUM]),
        ("sum by a method", [SUM]),
        ("read again", [LINKED_SUM]),
        ("read again before", [LINKED_SUM]),
        ("read by the average", [ALONE]),
        ("written", [ALONE]),
        ("written by another name", [ALONE]),
        ("doubled", [ALONE]),
        ("scaled", [ALONE]),
        ("with a number", [ALONE]),
        ("spread", [SUM]),  # and the op adds it as PyTorch does
        ("twice", [SUM, SUM]),
        ("twice, once without", [SUM]),
        ("norm read twice", []),
        ("before another function", []),
        ("without weight", []),
        ("without statistics", []),
    ],
)
def test_what_is_not_recognised_stays_as_it_is(
    place_in_network: str, wanted: list[tuple[bool, bool]], rewriting: Form
) -> None:
    torch.manual_seed(0)
    model = Varied(place_in_network).double()
    with_statistics(model)
    frozen = FrozenNetwork(model, form=rewriting)
    if wanted:
        assert kinds(frozen) == wanted
    else:
        assert not isinstance(frozen._copy, fx.GraphModule)
    assert frozen.unfolded == ["norm"] and len(frozen._affines) == (len(wanted) > 0)
    for _ in range(2):
        images = torch.rand(2, 8, 6, 6, dtype=torch.float64)
        assert_equal_to_rounding(frozen, model, images)
        change_(model)
        frozen.refresh()

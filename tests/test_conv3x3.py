"""The 3x3 convolution with its surroundings in one kernel, against float64 and to the bit."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from old_triton import interprets_no_loop
from test_frozen import conv_gradient_masks
from torch import Tensor
from torch.nn import functional as F

from reat_fast.attack import cross_entropy
from reat_fast.config import Config
from reat_fast.engine.step_attack import resolve_form
from reat_fast.kernels import boxes, fused_conv, own_conv
from reat_fast.kernels.boxes import Tile
from reat_fast.kernels.conv3x3 import (
    TILES,
    choose_tile,
    conv3x3,
    conv3x3_gradient,
    conv3x3_gradient_torch,
    conv3x3_pays,
    conv3x3_runs_on,
    conv3x3_torch,
)
from reat_fast.models import create_model
from reat_fast.networks.architectures import ResNet
from reat_fast.networks.frozen import FrozenNetwork, fastest_form
from reat_fast.step import TrainStep, make_optimizer

SMALL = Tile(64, 32, 4)
SHAPES = [  # batch, channels in and out, height, width
    (2, 8, 32, 6, 6),  # the input gradient alone
    (2, 64, 64, 8, 16),
    (5, 128, 64, 4, 4),
    (3, 32, 96, 7, 5),
    (1, 160, 32, 9, 14),
    (1, 32, 32, 1, 1),
]


def laid_out(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    return tensor.to(device, dtype).contiguous(memory_format=torch.channels_last)


class Drawn:
    """What a convolution [B, C, H, W] to [B, K, H, W] and its gradient meet."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: str, integers: bool = False
    ) -> None:
        batch, channels, outputs, height, width = shape
        torch.manual_seed(sum(shape))

        def made(*size: int) -> Tensor:
            if integers:
                return laid_out(torch.randint(-1, 2, size), dtype, device)
            return laid_out(torch.randn(size), dtype, device)

        self.x, self.behind = (
            made(batch, channels, height, width),
            made(batch, outputs, height, width),
        )
        weight = made(outputs, channels, 3, 3)
        # Of integers the sums stay exact; of other numbers they come to be about 1.
        self.weight = weight if integers else weight / (9 * channels) ** 0.5
        self.bias, self.residual = made(outputs, 1, 1, 1).flatten(), torch.randn_like(self.behind)
        self.relu, self.other = made(*self.x.shape).relu(), made(*self.x.shape)
        if integers:
            self.residual = made(*self.behind.shape)


def double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_are_float64_rounded_once(
    device: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    drawn = Drawn(shape, dtype, device)
    # One rounding to the dtype of a sum of float32, of numbers that come to be about 1.
    close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    for bias, residual in ((None, None), (drawn.bias, None), (drawn.bias, drawn.residual)):
        if not conv3x3_runs_on(drawn.x, drawn.weight):
            continue
        found = conv3x3(drawn.x, drawn.weight, bias, residual)
        wanted = conv3x3_torch(*double(drawn.x, drawn.weight, bias, residual))  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), wanted, **close)
    for relu, other in ((None, None), (drawn.relu, None), (drawn.relu, drawn.other)):
        found = conv3x3_gradient(drawn.behind, drawn.weight, relu, other)
        given = double(drawn.behind, drawn.weight, relu, other)
        wanted = conv3x3_gradient_torch(*given)  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), wanted, **close)
        assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("tile", [*TILES, SMALL])
def test_every_tile_gives_exact_sums_of_integers(device: str, tile: Tile) -> None:
    drawn = Drawn((3, 64, 96, 8, 8), torch.float16, device, integers=True)
    found = conv3x3(drawn.x, drawn.weight, drawn.bias, drawn.residual, tile=tile)
    wanted = conv3x3_torch(*double(drawn.x, drawn.weight, drawn.bias, drawn.residual))  # type: ignore[arg-type]
    assert torch.equal(found.double(), wanted)
    found = conv3x3_gradient(drawn.behind, drawn.weight, drawn.relu, drawn.other, tile=tile)
    given = double(drawn.behind, drawn.weight, drawn.relu, drawn.other)
    assert torch.equal(found.double(), conv3x3_gradient_torch(*given))  # type: ignore[arg-type]


def test_the_gradient_is_that_of_autograd() -> None:
    drawn = Drawn((2, 4, 6, 5, 7), torch.float64, "cpu")
    x = drawn.x.clone().requires_grad_()
    masked = F.conv2d(x.relu(), drawn.weight, padding=1)
    (wanted,) = torch.autograd.grad(masked, x, drawn.behind)
    found = conv3x3_gradient_torch(drawn.behind, drawn.weight, drawn.x.relu(), None)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_nan_reaches_its_neighbours_and_passes_the_mask(device: str) -> None:
    drawn = Drawn((2, 32, 32, 6, 6), torch.float16, device, integers=True)
    drawn.x[1, 3, 2, 4] = drawn.behind[1, 3, 2, 4] = torch.nan
    drawn.relu[0, 5, 0, 0] = torch.nan
    drawn.relu[0, 5, 0, 1] = -0.0
    near = torch.zeros(2, 1, 6, 6, dtype=torch.bool, device=device)
    near[1, :, 1:4, 3:6] = True
    drawn.weight.fill_(1)
    found = conv3x3(drawn.x, drawn.weight)
    assert torch.equal(found.isnan(), near.expand_as(found))
    found = conv3x3_gradient(drawn.behind, drawn.weight, drawn.relu, drawn.other)
    given = double(drawn.behind, drawn.weight, drawn.relu, drawn.other)
    wanted = conv3x3_gradient_torch(*given)  # type: ignore[arg-type]
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0, equal_nan=True)
    assert found[0, 5, 0, 0] != 0 and found[0, 5, 0, 1] == 0


def test_memory_around_the_tensors_is_neither_read_nor_written(device: str) -> None:
    shape = (3, 32, 32, 5, 5)
    plain, drawn = (Drawn(shape, torch.float16, device, integers=True) for _ in range(2))
    for name, tensor in vars(drawn).items():
        room = torch.full((tensor.numel() + 512,), torch.nan, dtype=tensor.dtype, device=device)
        middle = room[256:-256].as_strided(tensor.shape, tensor.stride(), 256)
        setattr(drawn, name, middle.copy_(tensor))
    for one, other in (
        (
            conv3x3(drawn.x, drawn.weight, drawn.bias, drawn.residual),
            conv3x3(plain.x, plain.weight, plain.bias, plain.residual),
        ),
        (
            conv3x3_gradient(drawn.behind, drawn.weight, drawn.relu, drawn.other),
            conv3x3_gradient(plain.behind, plain.weight, plain.relu, plain.other),
        ),
    ):
        assert torch.equal(one, other)


def test_what_is_added_and_what_masks_may_lie_otherwise(device: str) -> None:
    drawn = Drawn((2, 32, 64, 6, 5), torch.float16, device, integers=True)

    def otherwise(tensor: Tensor) -> tuple[Tensor, ...]:
        room = tensor.new_zeros(tensor.numel() + 1)
        shifted = room.as_strided(tensor.shape, tensor.stride(), 1).copy_(tensor)
        return tensor.contiguous(), shifted, tensor.repeat_interleave(2, 3)[..., ::2]

    bias = torch.stack([drawn.bias] * 2, 1)[:, 0]
    wanted = conv3x3(drawn.x, drawn.weight, drawn.bias, drawn.residual)
    for residual in otherwise(drawn.residual):
        assert torch.equal(conv3x3(drawn.x, drawn.weight, bias, residual), wanted)
    given = drawn.behind, drawn.weight
    wanted = conv3x3_gradient(*given, drawn.relu, drawn.other)
    for relu, other in zip(otherwise(drawn.relu), otherwise(drawn.other), strict=True):
        assert torch.equal(conv3x3_gradient(*given, relu, other), wanted)


def test_what_is_added_has_the_shape_and_dtype_of_the_result(device: str) -> None:
    drawn = Drawn((2, 32, 64, 6, 6), torch.float16, device)
    for residual in (drawn.residual[:1], drawn.residual[:, :, :1, :1], drawn.residual.float()):
        with pytest.raises(ValueError, match="residual"):
            conv3x3(drawn.x, drawn.weight, None, residual)
    with pytest.raises(ValueError, match="relu"):
        conv3x3_gradient(drawn.behind, drawn.weight, drawn.relu[:, :8])


def test_a_mask_on_fewer_channels_than_the_weight_has_is_the_librarys(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_conv, "conv3x3_pays", lambda x, channels: True)
    drawn = Drawn((2, 8, 32, 6, 6), torch.float16, device, integers=True)
    x = laid_out(drawn.relu[:, :3], torch.float16, device).requires_grad_()
    output, same = fused_conv.conv_relu_linked(
        x, drawn.weight, padding=(1, 1), masks_input=True, backend="triton"
    )
    found = torch.autograd.grad((output, same), x, (drawn.behind, torch.ones_like(x)))[0]
    wanted = conv3x3_gradient_torch(
        *double(drawn.behind * (output > 0), drawn.weight[:, :3], x, torch.ones_like(x))  # type: ignore[arg-type]
    )
    assert torch.equal(found.double(), wanted)


def test_what_the_kernels_do_not_take_is_known(device: str) -> None:
    good = Drawn((2, 32, 64, 6, 6), torch.bfloat16, device)
    assert conv3x3_runs_on(good.x, good.weight)
    assert conv3x3_runs_on(good.behind, good.weight, gradient=True)
    assert not conv3x3_runs_on(good.behind, good.weight)
    few = laid_out(torch.zeros(64, 8, 3, 3), torch.bfloat16, device)
    assert conv3x3_runs_on(good.behind, few, gradient=True)
    assert not conv3x3_runs_on(good.x[:, :8], few)
    wide = laid_out(torch.zeros(1, 32, 1, 129), torch.bfloat16, device)
    room = good.x.new_zeros(good.x.numel() + 1)
    shifted = room.as_strided(good.x.shape, good.x.stride(), 1)
    for x, weight in (
        (good.x.float(), good.weight.float()),
        (good.x.half(), good.weight),
        (good.x.contiguous(), good.weight),
        (good.x, good.weight.contiguous()),
        (good.x[:, :24], good.weight[:, :24]),
        (good.x, good.weight[:, :, :1, :1]),
        (good.x[:0], good.weight),
        (shifted, good.weight),
        (wide, good.weight),
    ):
        assert not conv3x3_runs_on(x, weight)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((128, 64, 32, 32), Tile(256, 64, 4)),
        ((128, 128, 16, 16), Tile(256, 128, 8)),
        ((128, 256, 8, 8), Tile(256, 64, 4)),
        ((128, 512, 4, 4), Tile(128, 64, 4)),
        ((128, 160, 32, 32), Tile(256, 64, 4)),  # 160 channels fill three tiles of 64 best
        ((1, 64, 8, 8), Tile(128, 64, 4)),
    ],
)
def test_tiles_are_as_large_as_keeps_a_gpu_busy(shape: tuple[int, ...], tile: Tile) -> None:
    assert choose_tile(torch.empty(shape, device="meta"), shape[1]) == tile


@pytest.mark.parametrize(
    ("read", "written", "pays"),
    [
        # Of 128 images, as timed on an H100.
        ((128, 128, 16, 16), 128, True),
        ((128, 256, 8, 8), 256, True),
        ((128, 512, 4, 4), 512, True),
        ((128, 128, 28, 28), 128, False),
        ((128, 256, 14, 14), 256, False),
        ((128, 512, 7, 7), 512, False),
        ((128, 160, 32, 32), 160, False),
        ((128, 160, 32, 32), 16, False),
        ((128, 64, 32, 32), 8, False),  # where weights cannot be resident
        ((128, 320, 16, 16), 320, False),
        ((128, 640, 8, 8), 640, False),
        # The last batch of an epoch, and one of an evaluation.
        ((113, 128, 16, 16), 128, True),
        ((1000, 128, 16, 16), 128, True),
        ((1000, 512, 4, 4), 512, True),
    ],
)
def test_they_pay_where_a_gpu_has_little_to_waste(
    read: tuple[int, ...], written: int, pays: bool
) -> None:
    assert conv3x3_pays(torch.empty(read, device="meta"), written) == pays


def test_they_are_chosen_where_they_were_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, low = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(own_conv, "why_not", lambda device: None)
    for capability, form in (((9, 0), "triton"), ((10, 0), "cudnn")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert fastest_form(low, cuda) == resolve_form(Config(precision="bf16"), cuda) == form
        assert fastest_form(torch.float16, cuda) == form
        assert fastest_form(torch.float32, cuda) == "eager"
    monkeypatch.setattr(own_conv, "why_not", lambda device: "needs something")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fastest_form(low, cuda) == "cudnn"
    assert fastest_form(low, torch.device("cpu")) == "eager"


class Case:
    """Two stages of a ResNet whose BatchNorms have seen data, on a device, images and labels."""

    def __init__(self, device: str) -> None:
        size, batch = (32, 32) if device == "cuda" else (4, 2)
        torch.manual_seed(0)
        model = ResNet((2, 1), width=64, num_classes=6, in_channels=3, stem_stride=1)
        for _ in range(5):
            model(torch.rand(16, 3, size, size))
        self.model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.images = torch.rand(batch, 3, size, size, device=device)
        self.labels = torch.arange(batch, device=device) % 6

    def gradient(self, frozen: FrozenNetwork) -> Tensor:
        images = self.images.clone().requires_grad_()
        loss = cross_entropy(frozen(images).float(), self.labels)
        return torch.autograd.grad(loss, images)[0]


@interprets_no_loop
def test_a_network_of_them_has_the_gradient_of_the_other_form(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_conv, "conv3x3_pays", lambda x, channels: True)
    case = Case(device)
    gradients = []
    for form, dtype in (("eager", None), ("cudnn", torch.bfloat16), ("triton", torch.bfloat16)):
        frozen = FrozenNetwork(case.model, dtype, form)  # type: ignore[arg-type]
        with conv_gradient_masks() as masks:
            gradients.append(case.gradient(frozen))
        assert len(masks) == (0 if form == "triton" else 8)
    exact, library, own = gradients
    # Each rounds every layer to bfloat16, ours a sum of gradients and its mask once: nearer on the
    # average (by 14 % over eight batches), and in one batch by chance, through ReLUs near zero.
    error, allowed = float((own - exact).norm()), float((library - exact).norm())
    assert 0 < error < 2 * allowed < 0.4 * float(exact.norm())


@pytest.mark.gpu
def test_a_network_of_them_can_be_captured_with_its_refresh(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(own_conv, "conv3x3_pays", lambda x, channels: True)
    case = Case("cuda")
    frozen = FrozenNetwork(case.model, torch.bfloat16, "triton")

    def made() -> Tensor:
        frozen.refresh()
        return case.gradient(frozen)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        made()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = made()
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(1.05)
    graph.replay()
    wanted = made()
    # The same kernels on the same numbers, but for the algorithms cuDNN may choose anew.
    assert float((captured - wanted).norm() / wanted.norm()) < 1e-2


@pytest.mark.parametrize(
    ("device", "precision", "named"),
    [("cpu", "bf16", "needs"), ("cuda", "tf32", "bf16")],
)
def test_the_flag_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, named: str
) -> None:
    if device == "cuda":  # whatever there is: the precision is what it lacks
        monkeypatch.setattr("reat_fast.kernels.boxes.why_not", lambda device: None)
    config = Config(attack_form="triton", precision=precision)  # type: ignore[arg-type]
    model = create_model("resnet8", 10)
    with pytest.raises(ValueError, match=f"--attack-form triton: .*{named}") as refused:
        TrainStep(model, make_optimizer(model, config), [50] * 10, config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("capability", "kilobytes", "hip", "fits"),
    [
        ((9, 0), 227, None, True),
        ((10, 0), 227, None, True),
        ((8, 0), 163, None, False),
        ((12, 0), 99, None, False),  # an RTX 50 fetches boxes, and has no room for the tiles
        ((9, 0), 227, "6.4", False),  # numbers of another maker
    ],
)
def test_tiles_run_where_boxes_are_fetched_and_fit(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    kilobytes: int,
    hip: str | None,
    fits: bool,
) -> None:
    memory = SimpleNamespace(shared_memory_per_block_optin=1024 * kilobytes)
    monkeypatch.setattr(boxes, "INTERPRETED", False)
    monkeypatch.setattr(boxes, "TensorDescriptor", object)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    reason = boxes.why_not(torch.device("cuda"))
    assert reason is None if fits else "needs a GPU" in str(reason)


def test_without_triton_a_device_that_could_not_run_it_is_named_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(boxes, "TensorDescriptor", None)
    monkeypatch.setattr(boxes, "INTERPRETED", False)
    assert "needs a GPU" in str(boxes.why_not(torch.device("cpu")))
    monkeypatch.setattr(boxes, "INTERPRETED", True)
    assert "pip install triton" in str(boxes.why_not(torch.device("cpu")))

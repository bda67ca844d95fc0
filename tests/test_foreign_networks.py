"""Networks with code of their own are attacked as they are, and copied whatever they keep."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_frozen import assert_equal_to_rounding, with_statistics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune, spectral_norm

from reat_fast import autoattack
from reat_fast.data import ImageSet
from reat_fast.evaluate import Attack, evaluate
from reat_fast.evaluation import victim
from reat_fast.evaluation.guards import GuardError
from reat_fast.evaluation.victim import attacked
from reat_fast.models import create_model
from reat_fast.networks import likeness
from reat_fast.networks.copies import copy_of
from reat_fast.networks.frozen import Form, FrozenNetwork
from reat_fast.networks.tracing import is_foreign


class Plain(nn.Module):
    """Two convolutions with BatchNorm and ReLU, which every form rewrites."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 4)
        with_statistics(self)

    def maps(self, images: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(images)))
        return self.relu(self.bn2(self.conv2(maps)))  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.maps(images).mean((2, 3)))  # type: ignore[no-any-return]


class Noisy(Plain):
    """Its own code makes a tensor and draws random numbers."""

    def maps(self, images: Tensor) -> Tensor:
        return super().maps(images + 0.3 * torch.randn(3, 6, 6, dtype=images.dtype))


class Blind(Plain):
    """A part of the gradient is not to come through."""

    def maps(self, images: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = self.relu(self.bn1(self.conv1(images)))
        return super().maps(images) * hidden.mean((1, 2, 3), keepdim=True)


class ReadsWeight(Plain):
    """The weight of a convolution is read elsewhere."""

    def maps(self, images: Tensor) -> Tensor:
        return F.conv2d(super().maps(images), self.conv2.weight, padding=1)


class ReadsStatistics(Plain):
    """The parameters of a BatchNorm are read elsewhere."""

    def maps(self, images: Tensor) -> Tensor:
        return super().maps(images) * self.bn1.weight.view(1, -1, 1, 1)


class Conv2d(nn.Conv2d):
    """Standardises its weight, under PyTorch's name."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class BatchNorm2d(nn.BatchNorm2d):
    """Turns its input round, under PyTorch's name."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x)


def turned(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (-given[0],)


def doubled(module: nn.Module, given: tuple[Tensor], output: Tensor) -> Tensor:
    return 2 * output


def with_own(name: str, kind: Callable[..., nn.Module], *size: Any, **more: Any) -> Plain:
    model = Plain()
    setattr(model, name, kind(*size, **more))
    with_statistics(model)
    return model


def with_hooks() -> dict[str, Plain]:
    models = {name: Plain() for name in ("bn before", "conv after", "relu after", "whole after")}
    models["bn before"].bn1.register_forward_pre_hook(turned)  # type: ignore[arg-type]
    models["conv after"].conv2.register_forward_hook(doubled)  # type: ignore[arg-type]
    models["relu after"].relu.register_forward_hook(doubled)  # type: ignore[arg-type]
    models["whole after"].register_forward_hook(doubled)  # type: ignore[arg-type]
    return models


def with_one_weight_for_two() -> Plain:
    model = Plain()
    model.conv1 = nn.Conv2d(3, 8, 3, padding=1)
    model.conv3, model.bn3 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
    model.conv3.weight = model.conv2.weight
    with_statistics(model)

    def maps(self: Any, images: Tensor) -> Tensor:
        return F.relu(self.bn3(self.conv3(Plain.maps(self, images))))

    model.maps = types.MethodType(maps, model)  # type: ignore[method-assign]
    return model


def with_forward_of_its_own() -> Plain:
    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        return self._conv_forward(x, 2 * self.weight, self.bias)

    model = Plain()
    model.conv2.forward = types.MethodType(forward, model.conv2)  # type: ignore[method-assign]
    return model


def pruned() -> Plain:
    model = Plain()
    prune.l1_unstructured(model.conv1, "weight", 0.3)
    prune.l1_unstructured(model.conv2, "weight", 0.3)
    return model


def normalised() -> Plain:
    model = Plain()
    spectral_norm(model.conv1)
    spectral_norm(model.conv2)
    return model


def foreign() -> dict[str, Plain]:
    return {
        **with_hooks(),
        "blind": Blind(),
        "reads a weight": ReadsWeight(),
        "reads statistics": ReadsStatistics(),
        "own convolution": with_own("conv1", Conv2d, 3, 8, 3, padding=1),
        "own BatchNorm": with_own("bn2", BatchNorm2d, 8),
        "one weight for two": with_one_weight_for_two(),
        "forward of its own": with_forward_of_its_own(),
        "pruned": pruned(),
        "normalised": normalised(),
    }


@pytest.mark.parametrize("form", ["eager", "cudnn", "cpu"])
@pytest.mark.parametrize("name", foreign())
def test_what_others_code_does_stays_in_the_frozen_network(name: str, form: Form) -> None:
    model = foreign()[name].double().eval()
    images = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    model(images)  # hooks that make a weight have made it
    assert_equal_to_rounding(FrozenNetwork(model, None, form), model, images)


def test_without_such_code_it_is_rewritten() -> None:
    frozen = FrozenNetwork(Plain().eval(), None, "cudnn")
    assert not frozen.unfolded and frozen.fused == 2


@pytest.mark.parametrize("form", ["eager", "cudnn"])
def test_a_random_defence_stays_random(form: Form) -> None:
    frozen, images = FrozenNetwork(Noisy().eval(), None, form), torch.rand(2, 3, 6, 6)
    assert not torch.equal(frozen(images), frozen(images))


class Counting(Plain):
    """Goes another way in the first call, which a copy made before it takes for the only one."""

    calls = 0

    def maps(self, images: Tensor) -> Tensor:
        Counting.calls += 1
        if Counting.calls % 2:
            return super().maps(images)
        return -super().maps(images)


class Asserts(Plain):
    """Counts on a convolution without a bias, which a BatchNorm that is folded would give it."""

    def maps(self, images: Tensor) -> Tensor:
        assert self.conv2.bias is None
        return super().maps(images)


@pytest.mark.parametrize("kind", [Noisy, Counting, Asserts])
def test_a_search_stays_with_the_model_where_rewriting_it_changes_it(kind: type[Plain]) -> None:
    model = kind().eval()
    with attacked(model) as victim:
        victim.check(torch.rand(4, 3, 6, 6))
        assert not victim._rewritten and len(victim._frozen.unfolded) == 2
    with attacked(Plain()) as victim:
        victim.check(torch.rand(4, 3, 6, 6))
        assert victim._rewritten and not victim._frozen.unfolded


class TakesTensors(Plain):
    """Normalises tensors, of which the trace's stand-ins are none."""

    def maps(self, images: Tensor) -> Tensor:
        return super().maps((images - 0.5) / 0.2 if isinstance(images, Tensor) else images)


class TakesLists(Plain):
    """Takes lists of maps too, and what is no tensor for one."""

    def maps(self, images: Tensor) -> Tensor:
        return super().maps(torch.cat([images] if isinstance(images, Tensor) else images, 1))


def form_on_a_gpu(dtype: torch.dtype, device: torch.device) -> Form:
    return "cudnn" if dtype.itemsize < 4 else "eager"


@pytest.mark.parametrize("kind", [Plain, TakesTensors, TakesLists])
def test_what_a_gpu_computes_in_16_bits_is_looked_at_too(
    kind: type[Plain], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (victim, likeness):
        monkeypatch.setattr(module, "fastest_form", form_on_a_gpu)
    model, images = kind().eval(), torch.rand(4, 3, 6, 6)
    with attacked(model, "bf16") as quick:
        assert quick._frozen.fused == 2
        quick.check(images)
        assert quick._rewritten == (kind is Plain)
        torch.testing.assert_close(quick(images), model(images), rtol=0, atol=0.02)


@pytest.mark.parametrize("name", foreign())
def test_attacks_search_the_model_itself(name: str) -> None:
    model, images = foreign()[name].eval(), torch.rand(4, 3, 6, 6)
    model(images)
    with attacked(model) as victim:
        victim.check(images)
        torch.testing.assert_close(victim(images), model(images))


def test_only_networks_of_others_are_looked_at() -> None:
    assert not is_foreign(create_model("resnet8", 4, width=8))
    assert is_foreign(Plain()) and is_foreign(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)))
    own = create_model("resnet8", 4, width=8)
    own.stem.register_forward_hook(doubled)  # type: ignore[union-attr, operator]
    assert is_foreign(own)


class Rounds(Plain):
    """Lets no gradient through to its images."""

    def maps(self, images: Tensor) -> Tensor:
        return super().maps((images * 255).round().to(torch.uint8).to(images.dtype) / 255)


def made_in_inference_mode() -> Plain:
    with torch.inference_mode():
        return Plain()


def of_buffers_alone() -> Plain:
    model = Plain()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, weight.detach())
    return model


@pytest.mark.parametrize("make", [Rounds, made_in_inference_mode, of_buffers_alone])
def test_a_network_without_gradients_is_evaluated(make: Callable[[], Plain]) -> None:
    model = make().eval()
    pixels = torch.randint(0, 256, (8, 6, 6, 3), dtype=torch.uint8)
    with torch.no_grad():
        labels = model(pixels.permute(0, 3, 1, 2) / 255).argmax(1)
    image_set = ImageSet(pixels.numpy(), labels.clone().numpy())
    found = evaluate(model, image_set, [Attack.from_name("clean", 0.1)], 4, eps=0.1)
    assert found["attacks"]["clean"]["overall"] == 100


def test_an_attack_may_be_of_the_same_radius_in_fewer_digits() -> None:
    pixels, labels = np.full((4, 6, 6, 3), 200, np.uint8), np.arange(4)
    found = evaluate(
        Plain().eval(),
        ImageSet(pixels, labels),
        [Attack.from_name("fgsm", 0.03137255)],
        4,
        eps=8 / 255,
    )
    assert list(found["attacks"]) == ["fgsm"]


def test_what_cannot_be_copied_is_named() -> None:
    model = Plain()
    model.kept = [model(torch.rand(1, 3, 6, 6))]  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^model: Plain cannot be copied \(.*; detach"):
        copy_of(model)


def test_a_model_without_tensors_or_of_few_bits_is_named() -> None:
    images, labels = torch.rand(4, 3, 6, 6), torch.arange(4)
    empty = nn.Sequential(nn.Flatten())
    script = torch.jit.trace(Plain().eval(), images)  # type: ignore[no-untyped-call]
    for model, message in (
        (script, "model: TorchScript cannot be rewritten; give the module"),
        (empty, "model: has neither parameters nor buffers"),
        (lambda x: x, "model: a function; give an nn.Module"),
        (Plain().bfloat16().eval(), "model: torch.bfloat16; give it in float32"),
    ):
        with pytest.raises(ValueError, match=message), attacked(model):  # type: ignore[arg-type]
            pass
    with pytest.raises(ValueError, match="model: has neither"):
        autoattack(empty, images, labels)  # type: ignore[arg-type]


def test_an_evaluation_knows_gradients_in_every_mode() -> None:
    model, images = Plain(), torch.rand(8, 3, 6, 6)
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), attacked(model) as victim:
            found.append(victim.gradient(images, lambda logits: logits[:, 0])[2])
    assert found[0].any() and all(torch.equal(found[0], one) for one in found)


def test_arrays_and_lists_in_place_of_tensors_are_named() -> None:
    with pytest.raises(ValueError, match="images, labels: Tensor and list; give torch tensors"):
        autoattack(Plain().eval(), torch.rand(2, 3, 6, 6), [0, 1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="images, labels: ndarray and Tensor; give torch tensors"):
        autoattack(Plain().eval(), np.zeros((2, 3, 6, 6)), torch.arange(2))  # type: ignore[arg-type]


def test_all_labels_are_looked_at() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0, 77])
    with pytest.raises(GuardError, match="reach from 0 to 77"):
        autoattack(Plain().eval(), torch.rand(6, 3, 6, 6), labels, batch_size=4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"restarts": 0}, "restarts: 0; must be"),
        ({"batch_size": 0}, "batch_size: 0; must be"),
        ({"eps": -1}, "eps: -1; must be a radius"),
        ({"eps": 8}, "eps: 8; must be a radius"),
        ({"precision": "fp16"}, "precision: 'fp16'; give one of float32, tf32, bf16"),
        ({"train_counts": [3, 2]}, "train_counts: give one number for each of the 4"),
        ({"num_classes": 3}, "num_classes: 3; the model has 4"),
        ({"model": nn.Sequential(Plain()).eval(), "num_classes": 3}, "none of the 3 classes"),
        ({"attacks": [Attack.from_name("pgd5", eps) for eps in (0.1, 0.2)]}, "give each name once"),
        ({"eps": 8 / 255}, "eps: 8/255, but pgd5 was made for 0.1; give Attack.from_name and eval"),
        ({"eps": 0.11}, "eps: 0.11, but pgd5 was made for 0.1; give"),
        ({"attacks": ["pgd5"]}, r"attacks: 'pgd5'; give Attack.from_name"),
        ({"image_set": [torch.zeros(2, 3, 6, 6)]}, "image_set: a list; give reat_fast.data.Image"),
        ({"image_set": ImageSet(np.zeros((0, 6, 6, 3), np.uint8), np.zeros(0, np.int64))}, "no im"),
        ({"model": nn.Sequential(Plain(), nn.Softmax(1)).eval()}, "gives probabilities"),
    ],
)
def test_what_makes_figures_of_something_else_is_refused(
    changes: dict[str, Any], named: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 6, 6, 3), dtype=np.uint8)
    given = {
        "model": Plain().eval(),
        "image_set": ImageSet(pixels, np.arange(8) % 4),
        "attacks": [Attack.from_name("pgd5", 0.1)],
        "num_classes": 4,
        "eps": 0.1,
        **changes,
    }
    with pytest.raises(ValueError, match=named):
        evaluate(**given)


@pytest.mark.parametrize(
    ("images", "labels", "named"),
    [
        (torch.zeros(2, 6, 6, 3), np.zeros(2, np.int64), "Tensor and ndarray; give numpy"),
        (np.zeros((2, 6, 6, 3), np.uint8), [0, 1], "ndarray and list; give numpy"),
        (np.zeros((2, 3, 6, 6), np.uint8), np.zeros(2, np.int64), "give uint8 .N, H, W, C."),
        (np.zeros((2, 6, 6, 3)), np.zeros(2, np.int64), "images: float64"),
        (np.zeros((2, 6, 6, 3), np.uint8), np.zeros((2, 1), np.int64), "labels: int64 of shape"),
        (np.zeros((2, 6, 6, 3), np.uint8), np.zeros(1, np.int64), "a class for each of 2 images"),
    ],
)
def test_an_image_set_of_something_else_is_refused(images: Any, labels: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        ImageSet(images, labels)

"""timm's models under the interface of this package, frozen for the attack.

timm imports torchvision for its data loading and for one isinstance check, neither of which a model
runs. Where torchvision cannot be imported, as beside a torch without CUDA, empty names stand in.
"""

from __future__ import annotations

import copy
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from test_frozen import assert_equal_to_rounding, with_statistics
from test_fused_update import assert_same_updates
from torch import nn

from reat_fast.kernels.pooled_linear import pooled_linear
from reat_fast.models import create_model
from reat_fast.networks.frozen import Form, FrozenNetwork
from reat_fast.networks.fused_update import FusedUpdate


class _AnyName(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _AnyName(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name.split(".")[0] == "torchvision":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]


@pytest.fixture(scope="module", autouse=True)
def timm() -> Iterator[None]:
    """Import timm with the real torchvision or, where that fails, with names in its place."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):
        pass
    else:
        yield
        return
    for package in ("timm", "torchvision"):
        _forget(package)
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        pytest.importorskip("timm")
        yield
    finally:
        sys.meta_path.remove(finder)
        for package in ("timm", "torchvision"):
            _forget(package)


@pytest.mark.parametrize("form", ["eager", "cudnn"])
@pytest.mark.parametrize(
    ("name", "unfolded", "fused"),
    [
        ("resnet18", 0, 17),
        ("resnext26ts", 0, 0),  # grouped convolutions, SiLU inside the BatchNorms
        ("seresnet18", 0, 17),  # convolutions of shortcuts are added in place into another tensor
        ("mobilenetv3_small_050", 0, 11),
        (
            "tf_mobilenetv3_small_minimal_100",
            0,
            12,
        ),  # "same" padding by another class of convolution
        ("regnety_002", 0, 28),
        ("densenet121", 62, 59),  # pre-activation: BatchNorm behind a concatenation
    ],
)
def test_folding_changes_nothing_but_rounding(
    name: str, unfolded: int, fused: int, form: Form
) -> None:
    torch.manual_seed(0)
    model = create_model(f"timm/{name}", 5).double()
    with_statistics(model)
    frozen = FrozenNetwork(model, form=form)
    batchnorms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(frozen.unfolded) == unfolded and set(frozen.unfolded) <= set(batchnorms)
    assert frozen.fused == (fused if form == "cudnn" else 0)
    # The smallest image whose last maps still have a size.
    assert_equal_to_rounding(frozen, model, torch.rand(1, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize(("name", "masks"), [("resnet18", True), ("seresnet18", False)])
def test_the_average_and_the_linear_layer_behind_it_are_one(name: str, masks: bool) -> None:
    frozen = FrozenNetwork(create_model(f"timm/{name}", 5), form="cudnn")
    assert isinstance(frozen._copy, torch.fx.GraphModule)
    (pooled,) = [node for node in frozen._copy.graph.nodes if node.target is pooled_linear]
    assert pooled.kwargs.get("masks_input", False) == masks


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("resnet18", 20),
        ("seresnet18", 20),
        ("mobilenetv3_small_050", 0),  # BatchNorms with an activation of their own
        ("densenet121", 0),
        ("convnext_atto", 0),
    ],
)
def test_a_fused_update_computes_the_bits_of_the_network(name: str, fused: int) -> None:
    torch.manual_seed(0)
    network = create_model(f"timm/{name}", 5).train()
    plain = copy.deepcopy(network)
    update = FusedUpdate(network)
    assert update.fused == fused
    assert_same_updates(network, update, plain, 32)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "test_efficientnet"])
def test_every_layer_but_batchnorm_takes_bfloat16(name: str) -> None:
    torch.manual_seed(0)
    model = create_model(f"timm/{name}", 5).eval()
    images = torch.rand(2, 3, 64, 64)
    frozen = FrozenNetwork(model, torch.bfloat16)
    logits = frozen(images)
    assert logits.dtype == torch.bfloat16
    # Dozens of layers that each round by 2^-9 relative, mostly averaging out.
    expected = model(images)
    error = (logits.float() - expected).norm() / expected.norm()
    assert 0 < float(error.detach()) < 0.1


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050", "convnext_atto"])
def test_features_stand_beside_logits(name: str) -> None:
    network = create_model(f"timm/{name}", 5, in_channels=1).eval()
    images = torch.rand(2, 1, 64, 64)
    features, logits = network.forward_features_logits(images)
    assert features.shape == (2, network.fc.in_features)
    assert torch.equal(logits, network.fc(features))
    assert torch.equal(logits, network.get_submodule("backbone")(images))


def test_small_stem_keeps_the_size_of_small_images() -> None:
    network = create_model("timm/resnet18", 5, small_stem=True).eval()
    backbone = network.get_submodule("backbone")
    maps = torch.rand(1, 3, 32, 32)
    for name in ("conv1", "maxpool", "layer1"):
        maps = backbone.get_submodule(name)(maps)
    assert maps.shape == (1, 64, 32, 32)
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/no_such_model", {}, "timm has no model 'no_such_model'"),
        ("timm/convnext_atto", {"small_stem": True}, "no conv1 and maxpool"),
        ("timm/dla34", {}, "does not end in one linear layer"),
    ],
)
def test_names_and_stems_that_do_not_exist_are_named(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(name, **options)


def test_a_timm_that_does_not_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"halted.*pip install 'reat-fast\[timm\]'"):
        create_model("timm/resnet18")

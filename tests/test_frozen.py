"""The folded network equals the one it came from and follows its weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from reat_fast.frozen import FrozenNetwork
from reat_fast.models import create_model
from reat_fast.networks import ConvBN, Network

NAMES = ["resnet8", "resnet18", "resnet50", "preact_resnet18", "wrn28_10"]


def trained(name: str, dtype: torch.dtype = torch.float64) -> Network:
    """Make a narrow network whose BatchNorms have seen data."""
    torch.manual_seed(1)
    model = create_model(name, 6, width=8).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.2, 3)  # type: ignore[union-attr]
    return model


def logits_and_gradient(network: object, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
    images = images.clone().requires_grad_()
    logits = network(images)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    return logits.detach(), gradient


@pytest.mark.parametrize("name", NAMES)
def test_folding_changes_nothing_but_rounding(name: str) -> None:
    model = trained(name)
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    frozen = FrozenNetwork(model)
    expected = logits_and_gradient(model.eval(), images)
    for found, wanted in zip(logits_and_gradient(frozen, images), expected, strict=True):
        scale = float(wanted.abs().max())
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10 * scale)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18"])
def test_bfloat16_rounds_folded_weights_and_keeps_batchnorm(name: str) -> None:
    model = create_model(name, 6, width=8)
    images = torch.rand(8, 3, 16, 16)
    for _ in range(30):
        model(images)
    frozen = FrozenNetwork(model, torch.bfloat16)
    expected = model.eval()(images)
    error = ((frozen(images).float() - expected).abs().max() / expected.abs().max()).detach()
    # Some twenty layers, each rounding weights and maps by 2^-9 relative, mostly averaging out.
    assert 0 < float(error) < 0.05
    kinds = {type(m): m.weight.dtype for m in frozen._copy.modules() if hasattr(m, "weight")}
    assert kinds[nn.Conv2d] == kinds[nn.Linear] == torch.bfloat16
    assert kinds.get(nn.BatchNorm2d, torch.float32) == torch.float32


def test_refresh_takes_up_new_weights_and_statistics_in_the_same_memory() -> None:
    model = trained("preact_resnet18")
    frozen = FrozenNetwork(model)
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    before = {name: t.data_ptr() for name, t in frozen._copy.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.1)
    stale = frozen(images)
    frozen.refresh()
    wanted = model.eval()(images)
    assert not torch.allclose(stale, wanted, rtol=1e-3)
    torch.testing.assert_close(frozen(images), wanted, rtol=1e-9, atol=1e-9)
    assert {name: t.data_ptr() for name, t in frozen._copy.state_dict().items()} == before


def test_no_weight_can_ask_for_a_gradient_and_the_source_is_left_alone() -> None:
    model = trained("resnet8").train()
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = FrozenNetwork(model)
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    frozen(images).sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in frozen._copy.parameters())
    assert model.training
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.state_dict().items())
    assert not any(isinstance(module, ConvBN) for module in frozen._copy.modules())

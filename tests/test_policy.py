"""The kernel against the PyTorch form, which tests/test_augment.py holds to Pillow: to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_augment import SHAPES, made_images
from torch import Tensor

from reat_fast.engine.augment import Policy, PolicyName, _choices, _policy, apply_policy
from reat_fast.kernels import policy as policy_file
from reat_fast.kernels.augment import OPERATIONS
from reat_fast.kernels.policy import BLOCK, drawn, run_policy

SEED, EPOCH = torch.tensor(-5), torch.tensor(3)
on_kernels = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", id="interpreter", marks=pytest.mark.interpreter),
        pytest.param("cuda", id="gpu", marks=pytest.mark.gpu),
    ],
)


def by_both(
    images: Tensor, indices: Tensor, policy: Policy, device: str, gather: bool
) -> tuple[Tensor, Tensor]:
    """Run a policy by the kernel on a device, and in PyTorch on the CPU."""
    size = images.shape[1], images.shape[2]
    there, here = (_choices(policy, *size, torch.device(name)) for name in (device, "cpu"))
    moved = (tensor.to(device) for tensor in (images, indices, SEED, EPOCH))
    found = run_policy(*moved, there, gather=gather, backend="triton")
    assert found.dtype == torch.uint8 and found.is_contiguous() and found.device.type == device
    return found.cpu(), run_policy(
        images, indices, SEED, EPOCH, here, gather=gather, backend="torch"
    )


@on_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_that_of_pytorch_to_the_bit(
    name: str, shape: tuple[int, int, int], device: str
) -> None:
    images, indices = made_images(8, *shape), torch.arange(8)
    policy = Policy((((name, 1.0, 9),), ((name, 1.0, 30),)), 31, 1)
    rows = drawn(_choices(policy, *shape[:2], torch.device("cpu")), SEED, EPOCH, indices)
    assert rows.unique().tolist() == [1, 2, 3, 4]  # both magnitudes, both signs
    found, expected = by_both(images, indices, policy, device, gather=True)
    assert torch.equal(found, expected)


@on_kernels
@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize(
    ("policy", "num_ops", "shape"),
    [
        ("autoaugment", 2, (32, 32, 3)),
        ("autoaugment", 2, (28, 28, 1)),
        ("randaugment", 3, (7, 10, 3)),
        ("randaugment", 1, (3, 2, 1)),
    ],
)
def test_a_policy_is_that_of_pytorch_to_the_bit(
    policy: PolicyName, num_ops: int, shape: tuple[int, int, int], gather: bool, device: str
) -> None:
    images = made_images(30, *shape)
    indices = torch.tensor([29, 3, 3, 0, 17, 5, 11, 22, 8, 2, 14, 26])
    images = images if gather else images[indices]
    found, expected = by_both(images, indices, _policy(policy, num_ops, 9), device, gather)
    assert torch.equal(found, expected)


@on_kernels
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_of_many_blocks_is_done_in_turns(channels: int, device: str) -> None:
    images = made_images(18, 41, 61, channels)
    assert 2 * BLOCK < 41 * 61 < 3 * BLOCK
    names = ("Rotate", "Contrast", "Color", "Sharpness", "AutoContrast", "Equalize")
    policy = Policy(tuple(((name, 1.0, 8),) for name in names), 31, 1)
    indices = torch.arange(18)
    choices = _choices(policy, 41, 61, torch.device("cpu"))
    done = choices.rows.operation[drawn(choices, SEED, EPOCH, indices)]
    assert {OPERATIONS[operation] for operation in done.flatten().tolist()} == set(names)
    found, expected = by_both(images, indices, policy, device, gather=False)
    assert torch.equal(found, expected)


@on_kernels
def test_seed_and_epoch_may_be_numbers_and_a_batch_small_or_strided(device: str) -> None:
    images = made_images(5, 9, 11, 3).to(device)
    indices = torch.tensor([4, 0, 2], device=device)
    for seed in (7, -7, 2**64 - 7):
        expected = apply_policy(images, indices, seed, 2, "autoaugment", backend="torch")
        for count in (0, 1, 3):
            part = indices.repeat_interleave(2)[::2][:count]
            found = apply_policy(images, part, seed, 2, "autoaugment", backend="triton")
            assert torch.equal(found, expected[:count])


@on_kernels
def test_nothing_round_the_images_is_read_or_written(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, indices = made_images(24, 7, 10, 3).to(device), torch.arange(24, device=device)
    expected = apply_policy(images, indices, 1, 0, "randaugment", backend="torch", magnitude=30)
    allocated: list[Tensor] = []
    empty = torch.empty

    def between_margins(shape: Any, **options: Any) -> Tensor:
        if options.get("dtype") != torch.uint8:
            return empty(shape, **options)
        allocated.append(torch.full((shape[0] + 2, *shape[1:]), 77, **options))
        return allocated[-1][1:-1]

    monkeypatch.setattr(torch, "empty", between_margins)
    for margin in (0, 255):
        store = torch.full((26, 7, 10, 3), margin, dtype=torch.uint8, device=device)
        store[1:-1] = images
        found = apply_policy(
            store[1:-1], indices, 1, 0, "randaugment", backend="triton", magnitude=30
        )
        assert torch.equal(found, expected) and torch.equal(store[1:-1], images)
    assert len(allocated) == 4
    for memory in allocated:
        assert (memory[[0, -1]] == 77).all()


@pytest.mark.interpreter
def test_a_step_of_the_policy_is_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []
    kernel = policy_file._policy_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launched.append(1)
            return kernel[grid]

    monkeypatch.setattr(policy_file, "_policy_kernel", Counted())
    images, indices = made_images(1, 4, 4, 1), torch.zeros(1, dtype=torch.int64)
    for policy, num_ops, launches in (("autoaugment", 5, 2), ("randaugment", 3, 3)):
        launched.clear()
        apply_policy(images, indices, 0, 0, policy, num_ops=num_ops, backend="triton")
        assert len(launched) == launches

"""What kernels of maps read as numbers per channel: none of another kind, number, order, device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reat_fast.kernels.maps import are_per_channel

MAPS = torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("value", "fits"),
    [
        (torch.zeros(4), True),
        (torch.zeros(4, dtype=torch.bfloat16), False),
        (torch.zeros(5), False),
        (torch.zeros(8)[::2], False),
        (torch.zeros(4, device="meta"), False),
    ],
)
def test_kernels_take_float32_numbers_in_order_one_a_channel(value: Tensor, fits: bool) -> None:
    assert are_per_channel(MAPS, torch.zeros(4), value) == fits

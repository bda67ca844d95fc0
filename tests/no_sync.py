"""A guard against waiting: what must run without asking the device runs inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NoSync(TorchDispatchMode):
    """Refuse every operator that makes the host wait for the device or sizes depend on data."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "_unique",
        "equal",
        "is_nonzero",
        "item",
        "masked_select",
        "nonzero",
        "unique",
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.rstrip("_0123456789") in self.FORBIDDEN or name.startswith("unique"):
            raise AssertionError(f"{func} makes the host wait")
        # One number put at a mask fills it, and nothing has to be counted.
        fills = name.startswith("index_put") and args[2].numel() == 1
        indexed = name.startswith("index") and isinstance(args[1], (list, tuple)) and not fills
        if indexed and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]):
            raise AssertionError(f"{func} has a shape that depends on data")
        return func(*args, **(kwargs or {}))

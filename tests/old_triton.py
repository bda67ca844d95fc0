"""What older versions of Triton's interpreter cannot run."""

from __future__ import annotations

import numpy as np
import pytest

from reat_fast.kernels.triton_support import INTERPRETED, triton

interprets_no_loop = pytest.mark.skipif(
    INTERPRETED
    and [*map(int, triton.__version__.split(".")[:2])] < [3, 7]
    and [*map(int, np.__version__.split(".")[:2])] >= [2, 4],
    reason="Triton before 3.7 interprets no loop over the batch with numpy 2.4 or newer",
)

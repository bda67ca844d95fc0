"""Made inputs, and what the official REAT code (GuanlinLee/REAT, commit a7909fd) returned on them.

Recorded on a CPU with torch 2.13 by calling its RBL, BSL and REAT functions; the network, the
batch and the noise are made from seeds, so the numbers can be recorded again.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

COUNTS = [500, 320, 210, 130, 85, 54, 35, 22, 14, 9]
AE_COUNTS = [700, 100, 0, 300, 1, 77, 2, 5, 40, 3]

RBL_WEIGHTS = [
    2.65332744220359e-07,
    1.1627987532847328e-06,
    9.999776840209961,
    8.533633035767707e-07,
    9.999676694860682e-05,
    2.427313802400022e-06,
    5.072326894151047e-05,
    2.1902153093833476e-05,
    7.531275514338631e-06,
    3.732621553353965e-05,
]
RBL, BSL, TAIL = 3.356661081314087, 4.338800430297852, 2.1527066230773926
STEP_LOSSES = [3.68648099899292, 3.381416082382202, 3.005492925643921]
STEP_LOGIT_SUMS = [260.43267822265625, 238.88514709472656, 206.69857788085938]
CONV_SUM, FC_SUM = 50.84486389160156, 70.57937622070312


class TinyNetwork(nn.Module):
    """One convolution, BatchNorm, ReLU, mean and a linear layer, with made weights."""

    def __init__(self) -> None:
        super().__init__()
        made = np.random.RandomState(3)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)
        with torch.no_grad():
            self.conv.weight.copy_(torch.from_numpy(made.randn(8, 3, 3, 3) * 0.3))
            self.fc.weight.copy_(torch.from_numpy(made.randn(10, 8)))
            self.fc.bias.zero_()

    def forward_features_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = F.relu(self.bn(self.conv(images))).mean((2, 3))
        return features, self.fc(features)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features_logits(images)[1]


def inputs() -> dict[str, Tensor]:
    """Make logits, features, labels, images and the noise of three steps."""
    made = np.random.RandomState(7)
    logits = made.randn(24, 10).astype(np.float32) * 2
    features = made.randn(24, 16).astype(np.float32) * 2
    labels = made.randint(0, 10, 24)
    images = made.rand(24, 3, 8, 8).astype(np.float32)
    noise = made.uniform(-8 / 255, 8 / 255, (3, 24, 3, 8, 8)).astype(np.float32)
    arrays = {"logits": logits, "features": features, "labels": labels}
    arrays |= {"images": images, "noise": noise}
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}

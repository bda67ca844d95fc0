"""A small network, images for it and a short search: what the tests of our AutoAttack share."""

from __future__ import annotations

import numpy as np
import torch
from made_data import made_images
from torch import Tensor, nn

from reat_fast.attack import Norm
from reat_fast.evaluation.autoattack import AutoAttack
from reat_fast.evaluation.victim import Victim

EPS, EPS_L2 = 0.1, 0.8
RADII: dict[Norm, float] = {"linf": EPS, "l2": EPS_L2}
CLASSES = 6


def trained_model() -> nn.Module:
    """Return a network trained on made images until about half of its answers stand."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        network = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(128, CLASSES))
        optimizer = torch.optim.Adam(network.parameters(), 5e-3)
        images, labels = made(240, seed=1)
        for _ in range(60):
            noisy = (images + 0.1 * torch.randn_like(images)).clamp(0, 1)
            loss = nn.functional.cross_entropy(network(noisy), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


def made(count: int, seed: int) -> tuple[Tensor, Tensor]:
    labels = np.arange(count, dtype=np.int64) % CLASSES
    images = torch.from_numpy(made_images(labels, 3, seed=seed))
    return images.permute(0, 3, 1, 2).contiguous() / 255, torch.from_numpy(labels)


def search(victim: Victim, images: Tensor, labels: Tensor, **settings: object) -> AutoAttack:
    quick = {"eps": EPS, "seed": 0, "batch_size": 64, "steps": 12, "queries": 60}
    return AutoAttack(victim, lambda rows: images[rows], labels, **{**quick, **settings})

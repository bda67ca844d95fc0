"""A network under attack and images that it tells apart: what the tests of its captures share."""

from __future__ import annotations

import numpy as np
import torch
from made_data import made_images
from torch import Tensor

from reat_fast.data import ImageSet
from reat_fast.evaluation.attacks import Attack
from reat_fast.evaluation.trial import Images
from reat_fast.evaluation.victim import Victim
from reat_fast.models import create_model
from reat_fast.networks.architectures import Network

EPS, STEP, SIZE, COUNT = 8 / 255, 2 / 255, 8, 27  # three whole batches and one of three


def pixels(count: int) -> np.ndarray:
    return made_images(np.arange(count) % 4, 3, seed=4)


def make_victim(dtype: torch.dtype = torch.float32) -> Network:
    """Make a network with random weights that tells the images apart."""
    torch.manual_seed(0)
    model = create_model("resnet8", 4, width=8).eval()
    with torch.no_grad():
        model.fc.bias -= model(torch.from_numpy(pixels(COUNT)).permute(0, 3, 1, 2) / 255).mean(0)
    return model.to(dtype)


def labelled_images(count: int) -> ImageSet:
    """Make images with what the network takes them for: those near to its boundaries will fall."""
    images = pixels(count)
    with torch.no_grad():
        labels = make_victim()(torch.from_numpy(images).permute(0, 3, 1, 2) / 255).argmax(1)
    return ImageSet(images, labels.numpy())


def attack(name: str) -> Attack:
    return Attack.from_name(name, EPS, STEP)


def batch(victim: Victim, image_set: ImageSet, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    clean, start = Images(image_set, victim, 0, EPS)(rows)
    return clean, start, torch.from_numpy(image_set.labels)[rows]

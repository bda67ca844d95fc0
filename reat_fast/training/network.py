"""The network that a run trains, made from its configuration and what its data are like."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from reat_fast.config import Config
from reat_fast.data import Dataset
from reat_fast.methods.cosine_head import use_cosine_head
from reat_fast.models import refuse_other_size
from reat_fast.networks.architectures import Network
from reat_fast.storage.weights_file import ModelSpec


def build_network(
    config: Config, dataset: Dataset, counts: Sequence[int], device: torch.device
) -> tuple[ModelSpec, Network]:
    """Build a network with fresh weights by --seed, on the device; return what builds it again too.

    counts: training images per class, which the compensation of a cosine head needs.
    Errors: ValueError for a network that does not take the images of the data set.
    """
    shape = dataset.train.images.shape[1:]  # [H, W, C]
    spec = ModelSpec(
        name=config.model,
        num_classes=dataset.num_classes,
        in_channels=shape[-1],
        width=config.width,
        stem_stride=config.stem_stride,
        class_names=dataset.class_names,
        head=config.head,
        small_stem=config.small_stem,
    )
    torch.manual_seed(config.seed)
    network = spec.build()
    if config.model.startswith("timm/"):
        refuse_other_size(network, config.model, shape)
    if config.head == "cosine":
        head = use_cosine_head(network, config.head_scale)
        head.compensate_(counts, config.post_tau)
    moved: Network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return spec, moved

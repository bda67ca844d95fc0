"""The official REAT code, run from a clone that the user names: nothing of it is kept here.

Its training script runs when it is imported, so what the script does around the loss is written
anew: a forward on the clean images, the counts of predictions with a host wait for each sample, and
PGD-20 on the test set with batches of the training's size. Its loader, which torchvision and two
processes feed, is left out, in its favour.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from reat_fast.config import Config

NEEDED = {"loss_functions": "REAT", "resnet": "resnet18", "wrn": "WideResNet"}
"""Its files, and what is called in each."""

MODELS = ("resnet18", "wrn28_10")


def load_official(folder: Path) -> dict[str, ModuleType]:
    """Import the files of a clone that are needed, by name.

    Errors: ValueError in one line for a folder that is not a clone of the official code.
    """
    code = {}
    for name, function in NEEDED.items():
        file = folder / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"official_{name}", file)
        if not file.is_file() or spec is None or spec.loader is None:
            raise ValueError(f"--official {folder}: has no {name}.py; name a clone of REAT's code")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # the code is not ours: anything can come of it
            raise ValueError(f"--official {folder}: {name}.py cannot be run ({error})") from error
        if not hasattr(module, function):
            raise ValueError(f"--official {folder}: {name}.py has no {function}; is it REAT's?")
        code[name] = module
    return code


def as_loaded(images: Tensor) -> Tensor:
    """Return images uint8 [B, H, W, C] as the official loader gives them: float32 [B, C, H, W].

    Contiguous, as its ToTensor has them: cuDNN would take other kernels for what permute leaves,
    which is channels_last.
    """
    return images.permute(0, 3, 1, 2).contiguous().float() / 255


class Official:
    """The official network, optimiser and loss, with the settings of the official script.

    model: one of MODELS; counts: training images per class. float32 with TF32 in cuDNN, which is
    what PyTorch does unless told otherwise; NCHW. Errors: ValueError for another model, and on a
    CPU, where the code does not run.
    """

    def __init__(
        self, folder: Path, model: str, counts: Sequence[int], config: Config, device: torch.device
    ) -> None:
        code = load_official(folder)
        if device.type != "cuda":
            raise ValueError(f"--official {folder}: that code runs on a CUDA device only")
        if model not in MODELS:
            raise ValueError(f"--official {folder}: has {' and '.join(MODELS)}, not {model}")
        self._loss = code["loss_functions"].REAT
        resnet, wide = code["resnet"].resnet18, code["wrn"].WideResNet
        torch.manual_seed(0)
        made = resnet("cifar10") if model == "resnet18" else wide(num_classes=len(counts))
        self._model: Any = made.to(device)
        self._optimizer = torch.optim.SGD(
            self._model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay
        )
        self._counts, self._predicted = list(counts), [0] * len(counts)
        self._wrong = [0] * len(counts)
        self._flags = SimpleNamespace(eps=config.eps, ns=config.steps, ss=config.step_size)
        self.device = device

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take a training step on images of as_loaded and labels [B], in host memory."""
        with _settings():
            images, labels = images.to(self.device), labels.to(self.device)
            self._model.eval()
            F.cross_entropy(self._model(images), labels).item()
            logits, loss = self._loss(
                self._model,
                images,
                labels,
                self._optimizer,
                self._counts,
                self._counts,
                self._flags,
            )
            loss.backward()
            self._optimizer.step()
            loss.item()
            for predicted, label in zip(logits.argmax(1), labels, strict=True):
                self._predicted[predicted.item()] += 1
                if predicted.item() != label.item():
                    self._wrong[label.item()] += 1

    def evaluate(self, images: Tensor, labels: Tensor) -> int:
        """Attack a batch of the test set by PGD-20; returns how many predictions withstand it."""
        eps, step_size = self._flags.eps, self._flags.ss
        with _settings():
            images, labels = images.to(self.device), labels.to(self.device)
            self._model.eval()
            adv = images + torch.empty_like(images).uniform_(-eps, eps)
            for _ in range(20):
                adv = adv.clamp(0, 1).detach().requires_grad_()
                loss = F.cross_entropy(self._model(adv), labels)
                (gradient,) = torch.autograd.grad(loss, adv)
                moved = adv.detach() + step_size * gradient.sign()
                adv = torch.clamp(moved - images, -eps, eps) + images
            self._model(images)  # the script counts the clean predictions too
            right = self._model(adv.clamp(0, 1)).argmax(1) == labels
            return int(right.sum())


@contextmanager
def _settings() -> Iterator[None]:
    """Set what the script sets, and give back what was."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32
    cudnn.deterministic = cudnn.benchmark = cudnn.allow_tf32 = True
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = before

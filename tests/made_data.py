"""Small made data sets: images whose class shows in where they are bright."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt


def made_images(
    labels: npt.NDArray[np.int64], channels: int, seed: int, size: int = 8
) -> npt.NDArray[np.uint8]:
    """Make noise with one bright pixel block per class, uint8 [N, size, size, channels]."""
    made = np.random.RandomState(seed)
    images = made.randint(0, 120, (len(labels), size, size, channels))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(int(label), size // 2)
        image[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 120
    return images.astype(np.uint8)


def made_npz(
    path: Path, *, classes: int = 4, train: int = 40, test: int = 6, channels: int = 3
) -> Path:
    """Write an .npz data set with `train` and `test` images per class; return its path."""
    y_train = np.repeat(np.arange(classes), train)
    y_test = np.repeat(np.arange(classes), test)
    np.savez(
        path,
        x_train=made_images(y_train, channels, seed=1),
        y_train=y_train,
        x_test=made_images(y_test, channels, seed=2),
        y_test=y_test,
    )
    return path

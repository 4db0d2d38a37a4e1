"""Datasets: images as one uint8 array."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and, where there are any, their labels.

    images: uint8 [n, channels, height, width];  labels: int64 [n] or None.
    """

    images: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)


def digits() -> Dataset:
    """The 1,797 handwritten digits, 8×8 grey, that scikit-learn ships (E. Alpaydin, C. Kaynak, UCI 1998).

    images: uint8 [1797, 1, 8, 8] (its 17 grey levels spread over 0…255);  labels: 0…9.
    """
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = np.rint(loaded.images * (255 / 16)).astype(np.uint8)
    return Dataset(images[:, None], loaded.target.astype(np.int64))

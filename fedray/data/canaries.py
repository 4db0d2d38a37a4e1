"""Canaries: images of random pixels, planted to measure later what a model tells of them (Carlini et al. 2019)."""

import json
from pathlib import Path

import numpy as np

from fedray import cache
from fedray.data.dataset import Dataset, keep
from fedray.data.images import sha256
from fedray.seeds import number

VERSION = 1  # of what is cached
CHUNK = 4096  # images that are copied at a time


def plant(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Return the dataset with so many canaries at its end: pixels 0 or 255, labels and columns of examples at random.

    Where the dataset is cached on this node, so is what is returned.
    """
    if not count:
        return dataset
    rng, n, shape = np.random.default_rng(number(seed, "canaries")), len(dataset), dataset.images.shape[1:]
    canaries = 255 * rng.integers(0, 2, (count, *shape), dtype=np.uint8)
    like = rng.integers(0, n, count)
    labels = None if dataset.labels is None else np.concatenate([dataset.labels, dataset.labels[like]])
    columns = {name: np.concatenate([column, column[like]]) for name, column in dataset.columns.items()}
    if dataset.source is None:
        return Dataset(np.concatenate([dataset.images, canaries]), labels, columns)

    def make(aside: Path) -> None:
        images = np.lib.format.open_memmap(aside / "images.npy", "w+", np.uint8, (n + count, *shape))
        for start in range(0, n, CHUNK):
            images[start : min(start + CHUNK, n)] = dataset.images[start : start + CHUNK]
        images[n:] = canaries
        images.flush()
        (aside / "about.json").write_text(json.dumps({"sha256": sha256(images)}))

    place = cache.kept("planting canaries", ["canaries", VERSION, dataset.sha256, count, seed], make)
    return keep(place / "images.npy", json.loads((place / "about.json").read_text())["sha256"], labels, columns)

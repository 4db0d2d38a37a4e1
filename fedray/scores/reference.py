"""The references that scores compare with: a dataset's features and their statistics, cached on each node."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedray import cache
from fedray.scores.frechet import Gaussian, frechet_distance, gaussian
from fedray.scores.prdc import NEIGHBOURS, Manifold, check_count, manifold
from fedray.seeds import generator
from fedray.vector import as_tensor

VERSION = 1  # of what is cached
DRAWN = 10_000  # images of a large dataset, drawn at random, that precision and recall are measured on


@dataclass(frozen=True, eq=False)
class Reference:
    """Features [m, d] of a dataset, float32 and memory-mapped, with what scores need of them.

    key: JSON that names the images (their SHA-256 in the form they were brought into), the network and its weights.
    """

    features: np.ndarray
    gaussian: Gaussian
    radii: torch.Tensor
    key: Any

    @cached_property
    def drawn(self) -> torch.Tensor:
        """The features [at most 10,000, d] of images drawn at random."""
        return as_tensor(_drawn(self.features))

    @property
    def manifold(self) -> Manifold:
        """The balls of the real images. Raises ValueError where there are too few."""
        check_count(len(self.features), "real")
        return Manifold(self.drawn, self.radii)

    def floor(self, n: int) -> tuple[float, int]:
        """Measure the Fréchet distance of n real images (at most half) to the other real ones; return also that n."""
        n = min(n, len(self.features) // 2)
        order = torch.randperm(len(self.features), generator=generator(0, "real against real")).numpy()

        def make(aside: Path) -> None:
            some, rest = (gaussian(self.features, part) for part in np.split(order, [n]))
            (aside / "floor.json").write_text(json.dumps(frechet_distance(some, rest)))

        place = cache.kept("real against real", ["floor", VERSION, self.key, n], make)
        return json.loads((place / "floor.json").read_text()), n


def reference(what: str, n: int, key: Any, features: Callable[[], Iterable[np.ndarray]]) -> Reference:
    """Open the reference of that key, made of `features()` (in batches, n in all) unless this node has it cached.

    Raises:
        ValueError: the features allow no statistics.
    """

    def make(aside: Path) -> None:
        kept, row = None, 0
        for batch in features():
            if kept is None:
                shape = (n, batch.shape[1])
                kept = np.lib.format.open_memmap(aside / "features.npy", "w+", np.float32, shape)
            kept[row : row + len(batch)] = batch
            row += len(batch)
        assert kept is not None
        assert row == n
        kept.flush()
        fitted = gaussian(kept)
        radii = manifold(_drawn(kept)).radii.numpy() if n > NEIGHBOURS else np.zeros(0, np.float32)
        np.savez(aside / "statistics.npz", mean=fitted.mean.numpy(), factor=fitted.factor.numpy(), radii=radii)

    place = cache.kept(what, ["reference", VERSION, key], make)
    kept = np.load(place / "features.npy", mmap_mode="r")
    with np.load(place / "statistics.npz") as statistics:
        mean, factor, radii = (torch.from_numpy(statistics[name]) for name in ("mean", "factor", "radii"))
    return Reference(kept, Gaussian(mean, factor), radii, key)


def _drawn(features: np.ndarray) -> np.ndarray:
    """Take at most 10,000 of the features, at random."""
    if len(features) <= DRAWN:
        return features
    order = torch.randperm(len(features), generator=generator(0, "manifold"))[:DRAWN]
    return features[order.sort().values.numpy()]

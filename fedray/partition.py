"""Who holds which examples."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from fedray.choices import UserError
from fedray.data import Dataset


@dataclass(frozen=True, eq=False)
class Shards:
    """The examples of every client as two arrays, however many clients there are.

    indices: int64 [n], examples in the order of their owners;  offsets: int64 [clients + 1].
    """

    indices: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, client: int) -> np.ndarray:
        """Indices into the dataset of one client's examples."""
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """Examples per client, int64 [clients]."""
        return np.diff(self.offsets)


class Partition(Protocol):
    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        """Deal all examples to `clients` clients, each at least one."""


@dataclass(frozen=True)
class IID:
    """Shuffled and cut into equal parts."""

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        return _cut(_permutation(len(dataset), rng), clients)


@dataclass(frozen=True)
class ByLabel:
    """Sorted by label and cut into equal parts: each client sees as few labels as possible.

    McMahan et al. 2017, section 3, with one part per client instead of two.
    """

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        order = _permutation(len(dataset), rng)
        return _cut(order[np.argsort(_labels(dataset, "by-label")[order], kind="stable")], clients)


@dataclass(frozen=True)
class Dirichlet:
    """Each label's examples are dealt in proportions drawn from Dir(α): the smaller α, the more skewed.

    Hsu, Qi and Brown 2019 (arXiv:1909.06335), with the draw per label (Yurochkin et al. 2019), so that every
    example has one owner. A client that would get nothing takes one example from the largest.
    """

    alpha: float

    def __post_init__(self) -> None:
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"partition dirichlet:{self.alpha:g}: alpha must be above 0.")

    def split(self, dataset: Dataset, clients: int, rng: torch.Generator) -> Shards:
        labels = _labels(dataset, "dirichlet")
        held: list[list[np.ndarray]] = [[] for _ in range(clients)]
        # NumPy's draw, seeded from ours: torch's gives NaN for small α.
        numpy_rng = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            members = members[_permutation(len(members), rng)]
            shares = numpy_rng.dirichlet(np.full(clients, self.alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for client, part in enumerate(np.split(members, cuts)):
                held[client].append(part)
        parts = [np.concatenate(parts) for parts in held]
        for client, part in enumerate(parts):
            if len(part) == 0:
                largest = max(range(clients), key=lambda other: len(parts[other]))
                parts[client], parts[largest] = parts[largest][:1], parts[largest][1:]
        return _shards(parts)


PARTITIONS: dict[str, type] = {"iid": IID, "by-label": ByLabel, "dirichlet": Dirichlet}


def _permutation(n: int, rng: torch.Generator) -> np.ndarray:
    return torch.randperm(n, generator=rng).numpy()


def _labels(dataset: Dataset, partition: str) -> np.ndarray:
    if dataset.labels is None:
        raise UserError(f"partition {partition} needs labels, and this dataset has none; use iid.")
    return dataset.labels


def _cut(order: np.ndarray, clients: int) -> Shards:
    return _shards(np.array_split(order, clients))


def _shards(parts: list[np.ndarray]) -> Shards:
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Shards(np.concatenate(parts), offsets)

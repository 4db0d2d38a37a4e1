"""Which clients hold canaries, and which of these they train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedray.config import Config
from fedray.data.canaries import plant
from fedray.data.dataset import Dataset
from fedray.data.partition import Shards
from fedray.seeds import number


@dataclass(frozen=True, eq=False)
class Canaries:
    """The canaries of a run, which come after its examples; a fair coin said of each whether it is trained on.

    With noise on the sum of clients, each is a client that holds this one image, as often as others hold images: what
    the noise hides. One that is not trained on never takes part. Else canaries are among clients' own images.

    seed: the run's;  first: index of the first;  planted: bool [n], those that are trained on;  clients: int64 [n],
    who holds each;  apart: they hold nothing else.
    """

    seed: int
    first: int
    planted: np.ndarray
    clients: np.ndarray
    apart: bool

    @classmethod
    def of(cls, config: Config, examples: int) -> Canaries:
        """Draw the canaries of a run on so many examples, from its seed."""
        n, rng = config.canaries, np.random.default_rng(number(config.seed, "canaries are planted"))
        planted, others = rng.random(n) < 0.5, config.clients - alone(config)
        held = np.arange(others, config.clients) if alone(config) else rng.permutation(n) % others
        return cls(config.seed, examples, planted, held, bool(alone(config)))

    @property
    def indices(self) -> np.ndarray:
        """Where they are among the examples, int64 [n]."""
        return np.arange(self.first, self.first + len(self.planted))

    @property
    def absent(self) -> frozenset[int]:
        """The clients that never take part."""
        return frozenset(self.clients[~self.planted].tolist() if self.apart else ())

    def planted_in(self, dataset: Dataset) -> Dataset:
        """Return the dataset with the canaries after it."""
        return plant(dataset, len(self.planted), self.seed)

    def added(self, shards: Shards, trained: bool) -> Shards:
        """Return shards with the canaries, if these are what is `trained` on, and with the clients that hold them."""
        parts = [shards[client] for client in range(len(shards))]
        if self.apart:
            often = max(1, round(len(shards.indices) / len(shards))) if trained else 0
            parts += [np.repeat(index, often) for index in self.indices]
        elif trained:
            for index, client in zip(self.indices[self.planted], self.clients[self.planted], strict=True):
                parts[client] = np.append(parts[client], index)
        return Shards.of(parts)


def alone(config: Config) -> int:
    """Return how many clients hold a canary, and nothing else."""
    return config.canaries if config.links.private else 0

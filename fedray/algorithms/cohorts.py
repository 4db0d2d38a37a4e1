"""Cohorts: which clients take part in a round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedray.errors import UserError
from fedray.lazy import torch


class Cohort:
    """A way to draw the clients of a round. Derive from it, as a frozen dataclass."""

    abstract = False  # not to be named by users
    rate: float | None = None  # q, where each client takes part with that probability, whatever others do
    fixed = False  # as many in every round, each set of so many as likely as another

    def expected(self, clients: int) -> float:
        """Return how many of the clients take part in a round on average."""
        raise NotImplementedError

    def draw(self, clients: int, rng: torch.Generator) -> list[int]:
        """Return the clients of a round, ascending."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fixed(Cohort):
    """The same number of clients in every round, without replacement: at least one, halves rounded up.

    The server's "random selected subset c ∈ C" (Chen 2024, section 2.4.1).
    """

    fraction: float = 1.0

    fixed = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"--fraction {self.fraction}: it must be above 0 and at most 1.")

    def expected(self, clients: int) -> float:
        return max(1, math.floor(self.fraction * clients + 0.5))

    def draw(self, clients: int, rng: torch.Generator) -> list[int]:
        return sorted(torch.randperm(clients, generator=rng)[: int(self.expected(clients))].tolist())


@dataclass(frozen=True)
class Poisson(Cohort):
    """Each client takes part with probability `rate`, whatever others do; a cohort may be empty.

    What the accounting of differential privacy assumes (Abadi et al. 2016; Mironov et al. 2019).
    """

    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise UserError(f"--cohort poisson:{self.rate}: the rate must be above 0 and at most 1.")

    def expected(self, clients: int) -> float:
        return self.rate * clients

    def draw(self, clients: int, rng: torch.Generator) -> list[int]:
        return (torch.rand(clients, generator=rng, dtype=torch.float64) < self.rate).nonzero()[:, 0].tolist()

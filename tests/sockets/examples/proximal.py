"""Clients that are pulled back to where they began (Li et al. 2020, FedProx, equation 2)."""

from dataclasses import dataclass

from fedray import Algorithm


@dataclass(frozen=True)
class FedProx(Algorithm):
    mu: float

    def correct(self, gradient, weights, down, memory):
        gradient.add_(weights - down["model"], alpha=self.mu)

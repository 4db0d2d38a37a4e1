"""Federated averaging with momentum at the server."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Round, Tensors, check_ranges
from fedray.lazy import torch
from fedray.vector import Layout


@dataclass(frozen=True)
class FedAvgM(Algorithm):
    """v ← β v + Δ and w ← w + η v, where Δ is the mean of the clients' changes (Hsu, Qi and Brown 2019).

    arXiv:1909.06335. With η = 1 and β = 0 it is federated averaging, bit for bit.
    """

    learning_rate: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_ranges(self, above_0=("learning_rate",), below_1=("beta",))

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        return {"model": model, "velocity": torch.zeros_like(model)}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        mean = folded.mean("model")
        change = mean - server["model"]
        velocity = self.beta * server["velocity"] + change
        # w + η v, by way of the mean: w + (mean − w) would be rounded twice.
        return server | {"model": mean + (self.learning_rate * velocity - change), "velocity": velocity}

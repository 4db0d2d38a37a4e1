"""Clients that are pulled back to where they began (Li et al. 2020, FedProx, arXiv:1812.06127)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Round, Rows, Tensors, check_ranges
from fedray.lazy import torch
from fedray.vector import Layout


@dataclass(frozen=True)
class FedProx(Algorithm):
    """A client minimises F_i(w) + μ/2 ‖w − w_t‖² (equation 2), by any optimizer; μ = 0 is federated averaging."""

    mu: float

    def __post_init__(self) -> None:
        check_ranges(self, not_negative=("mu",))

    def correct(self, gradient: torch.Tensor, weights: torch.Tensor, down: Tensors, memory: Tensors) -> None:
        gradient.add_(weights - down["model"], alpha=self.mu)


@dataclass(frozen=True)
class AdaptiveFedProx(Algorithm):
    """FedProx with μ that follows the loss: 0.1 more after it rose, 0.1 less after it fell five rounds in a row.

    The heuristic of the paper's appendix. There the loss is that of the global model on all clients; here it is what
    the cohort trained on, the mean weighted by examples. Each row records the next μ as aggregation.mu.
    """

    name = "fedprox-adaptive"

    mu: float = 0.0  # in the first round
    change: float = 0.1
    patience: int = 5

    def __post_init__(self) -> None:
        check_ranges(self, not_negative=("mu", "change"), above_0=("patience",))

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        before = {"loss": torch.full((1,), math.nan, dtype=torch.float64), "falls": torch.zeros(1, dtype=torch.int64)}
        return {"model": model, "mu": torch.tensor([float(self.mu)]), **before}

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        return {"model": server["model"], "mu": server["mu"]}

    def correct(self, gradient: torch.Tensor, weights: torch.Tensor, down: Tensors, memory: Tensors) -> None:
        gradient.addcmul_(weights - down["model"], down["mu"])

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        examples = math.fsum(rows["examples"] for _, rows in folded.rows)
        loss = math.fsum(rows["examples"] * rows["loss"] for _, rows in folded.rows) / examples
        before, mu = server["loss"].item(), server["mu"]
        falls = int(server["falls"]) + 1 if loss < before else 0  # in a row; before the first round there is no loss
        if loss > before:
            mu = mu + self.change
        elif falls == self.patience:
            mu, falls = (mu - self.change).clamp(min=0), 0
        state = {
            "mu": mu,
            "loss": torch.full_like(server["loss"], loss),
            "falls": torch.full_like(server["falls"], falls),
        }
        return super().aggregate(server, folded, round) | state

    def diagnose(self, before: Tensors, after: Tensors, folded: Folded, round: Round) -> Rows:
        return super().diagnose(before, after, folded, round) | {"mu": after["mu"].item()}

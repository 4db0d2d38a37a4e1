"""Adaptive optimizers at the server (Reddi et al. 2021, arXiv:2003.00295, algorithm 2).

Δ is the mean of the clients' changes. m ← β1 m + (1 − β1) Δ, v as each method says, w ← w + η m / (√v + τ). As in the
paper, v begins at τ², and no bias is corrected.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Round, Tensors, check_ranges
from fedray.lazy import torch
from fedray.vector import Layout


class _FedOpt(Algorithm):
    learning_rate: float  # η
    beta1: float
    tau: float

    def __post_init__(self) -> None:
        below_1 = [name for name in ("beta1", "beta2") if hasattr(self, name)]
        check_ranges(self, above_0=("learning_rate", "tau"), below_1=below_1)

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Return the next v, from the last one and Δ²."""
        raise NotImplementedError

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        return {"model": model, "m": torch.zeros_like(model), "v": torch.full_like(model, self.tau**2)}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        change = folded.mean("model") - server["model"]
        m = self.beta1 * server["m"] + (1 - self.beta1) * change
        v = self.second_moment(server["v"], change.square())
        return server | {"model": server["model"] + self.learning_rate * m / (v.sqrt() + self.tau), "m": m, "v": v}


@dataclass(frozen=True)
class FedAdagrad(_FedOpt):
    """v ← v + Δ²; without momentum (β1 = 0), as in the paper's experiments."""

    learning_rate: float = 0.1
    beta1: float = 0.0
    tau: float = 1e-3

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return v + square


@dataclass(frozen=True)
class FedAdam(_FedOpt):
    """v ← β2 v + (1 − β2) Δ²."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return self.beta2 * v + (1 - self.beta2) * square


@dataclass(frozen=True)
class FedYogi(_FedOpt):
    """v ← v − (1 − β2) Δ² sign(v − Δ²)."""

    learning_rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def second_moment(self, v: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        return v - (1 - self.beta2) * square * (v - square).sign()

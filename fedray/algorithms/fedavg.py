"""Federated averaging."""

from dataclasses import dataclass

from fedray.algorithms import Algorithm


@dataclass(frozen=True)
class FedAvg(Algorithm):
    """w ← Σ n_i v_i / Σ n_i over the clients that took part (McMahan et al. 2017, algorithm 1; Chen 2024, 2.4.1)."""

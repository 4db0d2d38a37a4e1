"""Example-level differential privacy at the client (Abadi et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Algorithm, Local, Rows, Tensors, Wrapper, check_ranges
from fedray.algorithms.fedavg import FedAvg
from fedray.lazy import torch


@dataclass(frozen=True)
class DPSGD(Wrapper):
    """Clients train, around any method, on noisy gradients: (Σ g_i min(1, C / ‖g_i‖) + N(0, σ² C² I)) / (q n).

    A step's examples are those that are drawn each with probability q = batch / n of a client's n (algorithm 1). What a
    client sends hides each of its examples, also from the server; each client has its own ε.

    norm: C;  noise: σ.
    """

    norm: float
    noise: float
    algorithm: Algorithm = FedAvg()

    def __post_init__(self) -> None:
        check_ranges(self, above_0=("norm",), not_negative=("noise",))
        if self.algorithm.example_noise is not None:
            raise ValueError("there is dpsgd in it already; once is enough")

    @property
    def example_noise(self) -> float:
        return self.noise

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        local.protect(self.norm, self.noise)
        self.algorithm.train(local, down, memory)

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        before = memory.pop("dpsgd/steps", torch.zeros(1, dtype=torch.int64))
        tensors, rows, kept = self.algorithm.upload(local, down, memory)
        steps = before + local.steps
        return tensors, rows | {"example_steps": float(steps)}, kept | {"dpsgd/steps": steps}

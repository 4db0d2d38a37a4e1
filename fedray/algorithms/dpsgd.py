"""Example-level differential privacy at the client (Abadi et al. 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Algorithm, Local, Tensors, Wrapper, check_ranges
from fedray.algorithms.fedavg import FedAvg


@dataclass(frozen=True)
class DPSGD(Wrapper):
    """Clients train, around any method, on noisy gradients: (Σ g_i min(1, C / ‖g_i‖) + N(0, σ² C² I)) / (q n).

    A step's examples are those that are drawn each with probability q = batch / n of a client's n (algorithm 1). What a
    client sends hides each of its examples, also from the server; each client has its own ε.

    norm: C;  noise: σ; without one, that of --target-epsilon.
    """

    norm: float
    noise: float | None = None
    algorithm: Algorithm = FedAvg()

    def __post_init__(self) -> None:
        check_ranges(self, above_0=("norm",), not_negative=() if self.noise is None else ("noise",))
        if self.algorithm.hides_examples:
            raise ValueError("there is dpsgd in it already; once is enough")

    @property
    def hides_examples(self) -> bool:
        return True

    @property
    def example_noise(self) -> float | None:
        return self.noise

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        local.protect(self.norm, local.round.example_noise if self.noise is None else self.noise)
        self.algorithm.train(local, down, memory)

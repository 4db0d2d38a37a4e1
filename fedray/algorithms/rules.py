"""How updates become the next model."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Update:
    """What one client returned: its trained vector [d], and the number of its examples (the weight)."""

    client: int
    vector: Tensor
    examples: int


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything that the next round depends on. `round` counts complete rounds."""

    round: int
    vector: Tensor  # [d] float32, the global model w
    ema: Tensor | None = None  # [d] float32, its exponential moving average
    base: Tensor | None = None  # float32, what is added to frozen weights that adapters sit on (rule flora)

    @property
    def sampled(self) -> Tensor:
        """The weights that samples are drawn from: the average, where there is one."""
        return self.vector if self.ema is None else self.ema


class Rule(Protocol):
    def step(self, state: ServerState, updates: Iterable[Update], adapters: Any, rng: torch.Generator) -> ServerState:
        """Fold the updates of one round, in the order given, into the next state (its `round` is set by the caller).

        Args:
            adapters: what the vector means, where it is adapters' (`fedray.lora.Adapters`); None where it is a model.
            rng: for rules that draw.
        """


@dataclass(frozen=True)
class FedAvg:
    """w ← Σ n_i v_i / Σ n_i over the clients that took part (McMahan et al. 2017, algorithm 1).

    A running mean: it holds one update at a time, gives v itself, bit for bit, for a single client, and is
    right when a client drops out.
    """

    def step(
        self, state: ServerState, updates: Iterable[Update], adapters: Any = None, rng: torch.Generator | None = None
    ) -> ServerState:
        mean, examples = None, 0
        for update in updates:
            if update.examples == 0:
                continue
            examples += update.examples
            if mean is None:
                mean = update.vector.clone()
            else:
                mean.lerp_(update.vector, update.examples / examples)
        return state if mean is None else replace(state, vector=mean)

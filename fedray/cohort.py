"""Who takes part in a round."""

import torch


def choose(clients: int, fraction: float, rng: torch.Generator) -> list[int]:
    """The cohort: `fraction` of the clients (at least one), drawn without replacement, in ascending order.

    The server's "random selected subset c ∈ C" (Chen 2024, section 2.4.1).
    """
    size = max(1, round(fraction * clients))
    return sorted(torch.randperm(clients, generator=rng)[:size].tolist())

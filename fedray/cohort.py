"""Who takes part in a round."""

import torch


def size(clients: int, fraction: float) -> int:
    """How many clients a fraction of them is: at least one."""
    return max(1, round(fraction * clients))


def choose(clients: int, fraction: float, rng: torch.Generator) -> list[int]:
    """The cohort: `fraction` of the clients, drawn without replacement, in ascending order.

    The server's "random selected subset c ∈ C" (Chen 2024, section 2.4.1).
    """
    return sorted(torch.randperm(clients, generator=rng)[: size(clients, fraction)].tolist())

"""The cohort of a round: the clients that take part."""

import torch


def choose(clients: int, size: int, rng: torch.Generator) -> list[int]:
    """Draw `size` of the clients, without replacement, in ascending order.

    The server's "random selected subset c ∈ C" (Chen 2024, section 2.4.1).
    """
    return sorted(torch.randperm(clients, generator=rng)[:size].tolist())

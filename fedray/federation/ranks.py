"""Messages of clients whose adapters are of a smaller rank than the server's: only what they hold travels."""

from __future__ import annotations

import torch

from fedray.algorithms import Round, Tensors


def held_by(client: int, round: Round) -> torch.Tensor | None:
    """Return a mask [d] of what a client of a smaller rank holds of the adapters; None where it holds all."""
    return None if round.adapters is None else round.adapters.held(client)


def left_out(tensors: Tensors, client: int, round: Round) -> Tensors:
    """Return a client's tensors without what is beyond its rank."""
    held = held_by(client, round)
    return tensors if held is None else tensors | {"model": tensors["model"][held]}


def filled_in(tensors: Tensors, client: int, round: Round, received: Tensors | None) -> Tensors:
    """Return a client's decoded tensors with zeros beyond its rank.

    Args:
        received: what the client received, where it sends differences from that.
    """
    held = held_by(client, round)
    if held is None:
        return tensors
    whole = torch.zeros(round.layout.size) if received is None else -received["model"]
    whole[held] = tensors["model"]
    return tensors | {"model": whole}

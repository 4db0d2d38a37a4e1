"""Who is to take part in a round, as it follows from the settings, and who did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch

from fedray.algorithms import Round
from fedray.config import Config
from fedray.record.run import Row
from fedray.seeds import generator


def cohort_of(config: Config, number: int) -> list[int]:
    """Draw the clients of the round of that number, from 0."""
    if config.only_client is not None:
        return [config.only_client]
    return config.drawn.draw(config.clients, generator(config.seed, "cohort", number))


def taken(config: Config, rounds: int) -> Counter[int]:
    """Count in how many of the first rounds each client is to take part."""
    return Counter(client for number in range(rounds) for client in cohort_of(config, number))


def dropped_of(config: Config, round: Round) -> frozenset[int]:
    """Draw the clients of a round's cohort that drop out before they train."""
    if not config.dropout_rate:
        return frozenset()
    draws = {client: torch.rand((), generator=round.rng("drop out", client)).item() for client in round.cohort}
    return frozenset(client for client, draw in draws.items() if draw < config.dropout_rate)


def took_part(rows: Iterable[Row]) -> set[int]:
    """Return the clients whose models have counted in these rows of rounds."""
    return {client["client"] for row in rows for client in row["clients"] if client["outcome"] == "ok"}

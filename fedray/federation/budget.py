"""What clients that add noise themselves would spend of their examples, worked out before a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedray.config import Config
from fedray.errors import UserError
from fedray.federation.cohort import taken
from fedray.federation.examples import rate_of
from fedray.menus import ALGORITHMS
from fedray.privacy import Release, epsilon, multiplier_for
from fedray.record.example_spending import LEDGER, ExampleSpending, Try

Sizes = np.ndarray  # int64 [clients], examples of each


def try_of(config: Config, noise: float, examples: int) -> Try:
    """Return what a client of so many examples releases in a round, with noise of multiplier σ."""
    if not examples:  # it fails before it begins
        return Try(Release(noise, 0, 0, 1.0), 0)
    rate = rate_of(config, examples)
    return Try(Release(noise, examples, rate * examples, rate), config.steps(examples))


def spent(config: Config, noise: float, sizes: Sizes, rounds: int) -> float:
    """Return the largest ε at δ that a client is to spend in so many rounds; infinite without noise."""
    tries = [(try_of(config, noise, n), times) for n, times in _most(config, sizes, rounds)]
    return max((each.epsilon(times, config.delta) for each, times in tries), default=0.0)


def noise_of(config: Config, sizes: Sizes) -> float:
    """Return the multiplier σ of clients' noise; where none is given, the least with which none is to exceed
    --target-epsilon; 0 where clients add none.

    Raises:
        UserError: no noise reaches it.
    """
    if config.method.example_noise is not None:
        return config.method.example_noise
    if not config.method.hides_examples or config.target_epsilon is None:
        return 0.0
    noise = 0.0
    for n, times in _most(config, sizes, config.rounds):
        each = try_of(config, noise, n)
        release, steps = each.release, each.steps * times
        if not noise or epsilon({release: steps}, config.delta) > config.target_epsilon:
            noise = multiplier_for(replace(release, multiplier=1.0), steps, config.target_epsilon, config.delta)
    return noise


def check_budget(config: Config, noise: float, sizes: Sizes) -> None:
    """Raise `UserError` where a client would spend more than --max-epsilon of its examples."""
    if config.max_epsilon is None:
        return
    some = range(1, config.rounds + 1)
    fits = bisect_right(some, config.max_epsilon, key=lambda rounds: spent(config, noise, sizes, rounds))
    if fits < config.rounds:
        raise UserError(
            f"--max-epsilon {config.max_epsilon:g} is enough for {fits} of {config.rounds} rounds of "
            f"--algorithm {ALGORITHMS.form(config.algorithm)}."
        )


def example_spending(
    config: Config, noise: float, sizes: Sizes, directory: Path, publish: Callable[[], None] = lambda: None
) -> ExampleSpending:
    """Open the ledger of a run's clients.

    Raises:
        UserError: the run has rounds that no ledger knows of.
    """
    rounds = directory / "rounds.jsonl"
    if rounds.exists() and rounds.stat().st_size and not (directory / LEDGER).exists():
        raise UserError(
            f"{directory} was begun by a version that kept no ledger of examples ({LEDGER}), so what its clients have "
            f"released is not known; it can be sampled from, but neither continued nor audited."
        )
    return ExampleSpending(
        directory, lambda client: try_of(config, noise, int(sizes[client])), config.delta, config.max_epsilon, publish
    )


def _most(config: Config, sizes: Sizes, rounds: int) -> list[tuple[int, int]]:
    """Return examples and rounds of those clients that may spend the most.

    ε grows with the rate q and with the number of steps: a client that has no more of either than another does not
    count.
    """
    kinds = {(int(sizes[client]), times) for client, times in taken(config, rounds).items() if sizes[client]}
    ordered = sorted(((rate_of(config, n), config.steps(n) * times, n, times) for n, times in kinds), reverse=True)
    found, most = list[tuple[int, int]](), 0
    for _, steps, n, times in ordered:
        if steps > most:
            most = steps
            found.append((n, times))
    return found

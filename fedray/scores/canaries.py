"""What a model tells of canaries: planted examples, of which a fair coin said whether they were trained on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedray.scores.membership import Membership, attack

CONFIDENCE = 0.999  # of the lower bound on ε


class Leak(NamedTuple):
    """What canaries show.

    attack: told apart by their losses those that were trained on from those that were not;  exposure: mean and 95 %
    interval;  p: of a mean as large by chance;  most: exposure of one that none of those not trained on comes before;
    epsilon: lower bound on ε.
    """

    attack: Membership
    exposure: tuple[float, float, float]
    p: float
    most: float
    epsilon: float


def leak(losses: np.ndarray, planted: np.ndarray, delta: float, rng: np.random.Generator) -> Leak:
    """Judge canaries by their losses [n], of which those `planted` (bool [n]) were trained on; some of each kind."""
    each, most = exposures(losses[planted], losses[~planted])
    again = [rng.choice(each, len(each)).mean() for _ in range(1000)]
    low, high = np.quantile(again, [0.025, 0.975])
    coins = [rng.permutation(planted) for _ in range(1000)]
    larger = sum(exposures(losses[heads], losses[~heads])[0].mean() >= each.mean() for heads in coins)
    return Leak(
        attack(losses[planted], losses[~planted]),
        (float(each.mean()), float(low), float(high)),
        (1 + larger) / (1 + len(coins)),
        most,
        epsilon_bound(losses, planted, delta),
    )


def exposures(members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the exposure of each canary that was trained on, [m], and the largest that there can be.

    log₂(n + 1) − log₂(rank), its rank among the n that were not, by the loss (Carlini et al. 2019, definition 5); of
    equal losses half come before it.
    """
    most, ordered = np.log2(len(others) + 1), np.sort(others)
    ranks = 1 + (np.searchsorted(ordered, members) + np.searchsorted(ordered, members, "right")) / 2
    return most - np.log2(ranks), float(most)


def epsilon_bound(losses: np.ndarray, planted: np.ndarray, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return an ε such that the training is not (ε', δ)-differentially private of any smaller ε', or that was luck.

    One run with many canaries, each trained on with probability 1/2, whatever happens to others (Steinke, Nasr and
    Jagielski 2023, theorem 5.2): the r/2 of the lowest losses are guessed to have been trained on, and the r/2 of the
    highest not to. r is all of them, a half, a quarter or an eighth; each gets a quarter of the chance to be wrong.

    Args:
        losses: [n];  planted: bool [n].
        confidence: the chance that the bound is above ε is at most one less this.
    """
    from scipy.optimize import brentq  # takes a second to import

    order, m = np.argsort(losses, kind="stable"), len(losses)
    sizes = sorted({m // share // 2 for share in (1, 2, 4, 8)} - {0})
    allowed, bound = (1 - confidence) / max(1, len(sizes)), 0.0
    for size in sizes:
        right = int(planted[order[:size]].sum() + (~planted[order[-size:]]).sum())

        def excess(epsilon: float, guesses: int = 2 * size, right: int = right) -> float:
            return chance(m, guesses, right, epsilon, delta) - allowed

        if excess(0.0) < 0:
            bound = max(bound, float(brentq(excess, 0.0, 50.0)))
    return bound


def chance(m: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Bound the chance of so many right guesses about m canaries, if the training is (ε, δ)-differentially private."""
    from scipy.stats import binom

    accuracy, missing = 1 / (1 + np.exp(-epsilon)), np.arange(1, right + 1)
    within = np.cumsum(binom.pmf(right - missing, guesses, accuracy)) / missing  # of i more, for each i
    slack = float(within.max(initial=0.0))
    return min(1.0, float(binom.sf(right - 1, guesses, accuracy)) + 2 * m * delta * slack)

"""Membership inference: can examples that were trained on be told from others by their losses (Yeom et al. 2018)?

A low true-positive rate at a low false-positive rate says more than the area under the curve (Carlini et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

RATES = (0.01, 0.001)  # of false positives
RESAMPLES = 1000
FEW = 5  # of fewer clients, drawing them anew gives no interval

Clients = tuple[np.ndarray, np.ndarray]  # int64 [m], [n], of each example
Interval = tuple[float, float | None, float | None]  # value, low, high
Rate = tuple[float, float, float, float]  # value, low, high, p


class Membership(NamedTuple):
    """An attack by a threshold on losses: a number, and the interval that holds it with 95 % confidence.

    auc: chance that one trained on has the lower loss of two, one of each kind; 0.5 by guessing;  p: of an area as
    large by chance (`by_chance`);  rates: `true_positive_rate` by the rate of false positives, as far as there are
    enough examples that were not trained on.
    """

    auc: tuple[float, float, float]  # value, low, high
    p: float
    rates: dict[float, Rate]


def attack(members: np.ndarray, others: np.ndarray, clients: Clients | None = None) -> Membership:
    """Attack losses [m] of examples that were trained on and [n] of others.

    Args:
        clients: whose these examples are, [m] and [n]. Then each p is for examples of which each client chose at random
            which to hold out: clients' losses may differ, and so may the shares that they hold out. Without it both
            kinds are of one distribution.
    """
    return Membership(area(members, others), by_chance(members, others, clients), rates_of(members, others, clients))


def by_chance(members: np.ndarray, others: np.ndarray, clients: Clients | None = None) -> float:
    """Return p of an area as large, if both are of one distribution (Mann and Whitney 1947); of several, within each.

    Of several the sum of ranks has the mean and the variance of drawing each client's members anew from its ranks, and
    is taken to be normal.
    """
    from scipy.stats import mannwhitneyu, norm, rankdata  # takes a second to import

    if clients is None:
        return float(mannwhitneyu(members, others, alternative="less").pvalue)
    ranks, mean, variance = rankdata(np.concatenate([members, others])), 0.0, 0.0
    whose = np.concatenate(clients)
    for client in np.unique(whose):
        own = ranks[whose == client]
        m, size = int((clients[0] == client).sum()), len(own)
        mean += m * own.mean()
        variance += m * (size - m) / size * own.var(ddof=1) if size > 1 else 0.0
    if variance == 0:
        return 1.0
    return float(norm.cdf((ranks[: len(members)].sum() - mean) / variance**0.5))


def rates_of(members: np.ndarray, others: np.ndarray, clients: Clients | None = None) -> dict[float, Rate]:
    """Return true-positive rates by false-positive rates as far as there are enough others."""
    rates = [rate for rate in RATES if rate * len(others) >= 1]
    found = {rate: true_positive_rate(members, others, rate) for rate in rates}
    if clients is None or not rates:
        return found
    seen, larger = {rate: _below(members, others, rate) for rate in rates}, dict.fromkeys(rates, 0)
    for drawn, rest in _drawn(np.concatenate([members, others]), clients):
        for rate in rates:
            larger[rate] += _below(drawn, rest, rate) >= seen[rate]
    return {rate: (*found[rate][:3], (1 + larger[rate]) / (1 + RESAMPLES)) for rate in rates}


def _drawn(losses: np.ndarray, clients: Clients) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw each client's members anew among its losses [m + n]: yield those, and the others."""
    rng, whose, m = np.random.default_rng(0), np.concatenate(clients), len(clients[0])
    member = (np.arange(len(losses)) < m)[np.argsort(whose, kind="stable")]
    for _ in range(RESAMPLES):
        shuffled = np.lexsort((rng.random(len(losses)), whose))
        yield losses[shuffled[member]], losses[shuffled[~member]]


def area(members: np.ndarray, others: np.ndarray) -> tuple[float, float, float]:
    """Return the area under the curve and its 95 % interval (DeLong, DeLong and Clarke-Pearson 1988)."""
    from scipy.stats import rankdata

    m, n = len(members), len(others)
    ranks = rankdata(np.concatenate([members, others]))
    above = 1 - (ranks[:m] - rankdata(members)) / n  # of each member, the share of the others with higher losses
    below = (ranks[m:] - rankdata(others)) / m
    value = float(above.mean())
    deviation = (above.var(ddof=1) / m + below.var(ddof=1) / n) ** 0.5 if min(m, n) > 1 else 0.5
    return value, float(max(0, value - 1.96 * deviation)), float(min(1, value + 1.96 * deviation))


def pooled(areas: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> tuple[Interval, float]:
    """Combine attacks on several clients, each on examples of its own (van Elteren 1960).

    Args:
        areas: under the curve of each, [c].
        sizes: [c, 2], how many examples each was about that were trained on, and that were not.

    Returns:
        The mean area, weighted by m n / (m + n + 1), with a 95 % interval over clients, if there are at least five;
        and p by chance.
    """
    from scipy.stats import norm

    m, n = sizes.T.astype(np.float64)
    weights, variances = m * n / (m + n + 1), (m + n + 1) / (12 * m * n)
    value = float(np.average(areas, weights=weights))
    deviation = np.sqrt(np.sum(weights**2 * variances)) / weights.sum()
    p = float(norm.sf((value - 0.5) / deviation))
    if len(areas) < FEW:
        return (value, None, None), p
    drawn = rng.integers(0, len(areas), (RESAMPLES, len(areas)))
    again = np.average(areas[drawn], axis=1, weights=weights[drawn])
    low, high = map(float, np.quantile(again, [0.025, 0.975]))
    return (value, low, high), p


def true_positive_rate(members: np.ndarray, others: np.ndarray, rate: float) -> Rate:
    """Return the share of m members below the threshold that calls k = ⌊rate n⌋ of n others members.

    Its 95 % interval (Clopper and Pearson 1934) is for this threshold, as it was found; p is the chance of as many
    where losses of both are of one distribution, which is beta-binomial, of mean k / (n + 1).
    """
    from scipy.stats import betabinom, binomtest

    m, n, k = len(members), len(others), _false(others, rate)
    found = _below(members, others, rate)
    interval = binomtest(found, m).proportion_ci()
    return found / m, float(interval.low), float(interval.high), float(betabinom.sf(found - 1, m, k, n + 1 - k))


def _false(others: np.ndarray, rate: float) -> int:
    """Return how many of the others are called members."""
    return int(rate * len(others) + 1e-9)


def _below(members: np.ndarray, others: np.ndarray, rate: float) -> int:
    """Count members below the threshold of that rate of false positives."""
    k = _false(others, rate)
    return int((members < np.partition(others, k - 1)[k - 1]).sum())

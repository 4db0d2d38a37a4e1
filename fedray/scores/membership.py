"""Membership inference: can examples that were trained on be told from others by their losses (Yeom et al. 2018)?

A low true-positive rate at a low false-positive rate says more than the area under the curve (Carlini et al. 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RATES = (0.01, 0.001)  # of false positives
RESAMPLES = 1000
FEW = 5  # of fewer clients, drawing them anew gives no interval

Interval = tuple[float, float | None, float | None]  # value, low, high
Rate = tuple[float, float, float, float]  # value, low, high, p


class Membership(NamedTuple):
    """An attack by a threshold on losses: a number, and the interval that holds it with 95 % confidence.

    auc: chance that one trained on has the lower loss of two, one of each kind; 0.5 by guessing;  p: of an area as
    large by chance (Mann and Whitney 1947);  rates: `true_positive_rate` by the rate of false positives, as far as
    there are enough examples that were not trained on.
    """

    auc: tuple[float, float, float]  # value, low, high
    p: float
    rates: dict[float, Rate]


def attack(members: np.ndarray, others: np.ndarray) -> Membership:
    """Attack losses [m] of examples that were trained on and [n] of others from the same distribution."""
    return Membership(area(members, others), by_chance(members, others), rates_of(members, others))


def by_chance(members: np.ndarray, others: np.ndarray) -> float:
    """Return p of an area as large, if both are of one distribution (Mann and Whitney 1947)."""
    from scipy.stats import mannwhitneyu  # takes a second to import

    return float(mannwhitneyu(members, others, alternative="less").pvalue)


def rates_of(members: np.ndarray, others: np.ndarray) -> dict[float, Rate]:
    """Return true-positive rates by false-positive rates as far as there are enough others."""
    return {rate: true_positive_rate(members, others, rate) for rate in RATES if rate * len(others) >= 1}


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

    m, n = len(members), len(others)
    k = int(rate * n + 1e-9)
    found = int((members < np.partition(others, k - 1)[k - 1]).sum())
    interval = binomtest(found, m).proportion_ci()
    return found / m, float(interval.low), float(interval.high), float(betabinom.sf(found - 1, m, k, n + 1 - k))

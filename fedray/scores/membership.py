"""Membership inference: can examples that were trained on be told from others by their losses (Yeom et al. 2018)?

A low true-positive rate at a low false-positive rate says more than the area under the curve (Carlini et al. 2022).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RATES = (0.01, 0.001)  # of false positives
RESAMPLES = 1000


class Membership(NamedTuple):
    """An attack by a threshold on losses: a number, and the interval that holds it with 95 % confidence.

    auc: chance that one trained on has the lower loss of two, one of each kind; 0.5 by guessing;  p: of an area as
    large by chance (Mann and Whitney 1947);  rates: true-positive rates by false-positive rates, as far as there are
    enough examples that were not trained on.
    """

    auc: tuple[float, float, float]  # value, low, high
    p: float
    rates: dict[float, tuple[float, float, float]]


def attack(members: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> Membership:
    """Attack losses [m] of examples that were trained on and [n] of others from the same distribution."""
    from scipy.stats import mannwhitneyu  # takes a second to import

    return Membership(
        auc=area(members, others),
        p=float(mannwhitneyu(members, others, alternative="less").pvalue),
        rates=rates_of(members, others, rng),
    )


def rates_of(
    members: np.ndarray, others: np.ndarray, rng: np.random.Generator
) -> dict[float, tuple[float, float, float]]:
    """Return true-positive rates, each with its interval, by false-positive rates as far as there are enough others."""
    return {rate: true_positive_rate(members, others, rate, rng) for rate in RATES if rate * len(others) >= 1}


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


def pooled(areas: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> tuple[tuple[float, float, float], float]:
    """Combine attacks on several clients, each on examples of its own (van Elteren 1960).

    Args:
        areas: under the curve of each, [c].
        sizes: [c, 2], how many examples each was about that were trained on, and that were not.

    Returns:
        The mean area, weighted by m n / (m + n + 1), with a 95 % interval over clients; and p by chance.
    """
    from scipy.stats import norm

    m, n = sizes.T.astype(np.float64)
    weights, variances = m * n / (m + n + 1), (m + n + 1) / (12 * m * n)
    value = float(np.average(areas, weights=weights))
    deviation = np.sqrt(np.sum(weights**2 * variances)) / weights.sum()
    drawn = rng.integers(0, len(areas), (RESAMPLES, len(areas)))
    again = np.average(areas[drawn], axis=1, weights=weights[drawn])
    low, high = map(float, np.quantile(again, [0.025, 0.975]))
    return (value, low, high), float(norm.sf((value - 0.5) / deviation))


def true_positive_rate(
    members: np.ndarray, others: np.ndarray, rate: float, rng: np.random.Generator
) -> tuple[float, float, float]:
    """Return the share of members below the threshold that calls so many of the others members; a bootstrap interval.

    By guessing it is ⌊rate n⌋ / (n + 1).
    """
    allowed = int(rate * len(others) + 1e-9)

    def share(members: np.ndarray, others: np.ndarray) -> float:
        return float(np.mean(members < np.partition(others, allowed - 1)[allowed - 1]))

    again = [share(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(RESAMPLES)]
    low, high = np.quantile(again, [0.025, 0.975])
    return share(members, others), float(low), float(high)

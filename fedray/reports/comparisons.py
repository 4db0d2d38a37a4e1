"""Differences between settings, with intervals that hold for all pairs at once."""

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd

LEVEL = 0.95
POWER = 0.8


class Difference(NamedTuple):
    """By how much one setting's score is higher than another's."""

    value: float
    low: float
    high: float
    """The 95 % interval; NaN where the settings share fewer than two seeds."""
    seeds: int


@dataclass(frozen=True, eq=False)
class Comparisons:
    """All differences between settings.

    table: scores [seeds that all settings have, settings];  half: half of the width of each 95 % interval (NaN with
    fewer than two seeds);  visible: the true difference that an interval tells from 0 with a chance of 80 %.
    """

    table: pd.DataFrame
    half: float
    visible: float

    @property
    def pairs(self) -> int:
        """How many pairs of settings there are: the family of the intervals."""
        return math.comb(self.table.shape[1], 2)

    def difference(self, one: str, other: str) -> Difference:
        """Measure by how much `one` setting's score is higher than the `other`'s."""
        if not {one, other} <= set(self.table):
            return Difference(math.nan, math.nan, math.nan, 0)
        paired = not math.isnan(self.half)
        gap = (
            (self.table[one] - self.table[other]).mean()
            if paired
            else self.table[one].mean() - self.table[other].mean()
        )
        return Difference(gap, gap - self.half, gap + self.half, len(self.table) if paired else 0)


def compare(done: pd.DataFrame, score: str) -> Comparisons:
    """Compare the settings of complete runs, by the seeds that all of them have.

    Args:
        done: a row for each run, with the columns setting, seed and the score.
    """
    scored = done.dropna(subset=[score]).astype({score: float})
    table = scored.pivot_table(index="seed", columns="setting", values=score)
    whole = table.dropna()
    return compare_columns(whole if len(whole) else table)


def compare_columns(table: pd.DataFrame) -> Comparisons:
    """Compare the columns of a table [seeds, settings] by Tukey's method in blocks (Tukey 1953; a seed is a block).

    With k settings, n seeds and the mean square s² of what is left of the scores without the means of settings and of
    seeds, of ν = (k − 1)(n − 1) degrees of freedom, all intervals d ± q(0.95; k, ν) s/√n hold at once with a chance of
    95 %, so also those against a setting that was chosen because it was lowest. It takes scores to scatter alike in all
    settings. Of two settings it is the paired t interval. With values missing, there are no intervals.
    """
    values = table.to_numpy(float)
    n, k = values.shape
    if n < 2 or k < 2 or np.isnan(values).any():
        return Comparisons(table, math.nan, math.nan)
    left = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    freedom = (k - 1) * (n - 1)
    error = math.sqrt((left**2).sum() / freedom / n)  # of a setting's mean
    q, shift = _critical(k, freedom)
    return Comparisons(table, q * error, shift * math.sqrt(2) * error)


@cache
def _critical(k: int, freedom: int) -> tuple[float, float]:
    """Return the studentized range's quantile, and the shift of a t that exceeds it with a chance of 80 %."""
    from scipy import optimize, stats  # which take half a second to import

    q = float(stats.studentized_range.ppf(LEVEL, k, freedom))
    shift = optimize.brentq(lambda shift: stats.nct.sf(q / math.sqrt(2), freedom, shift) - POWER, 0, 10 + 10 * q)
    return q, float(shift)


def rms(values: pd.Series) -> float:
    """Average standard deviations, as a root mean square; NaN of none."""
    return float(np.sqrt(np.square(values.dropna().astype(float)).mean()))

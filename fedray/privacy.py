"""What a run's noise proves: (ε, δ)-differential privacy of its clients, by Google's dp-accounting.

ε in every row is from Rényi divergences (Mironov, Talwar and Zhang 2019), converted by Canonne, Kamath and Steinke
(2020, proposition 12); `exact_epsilon` is from discretised privacy loss distributions (Koskela et al. 2020), which lose
less.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fedray.errors import UserError

if TYPE_CHECKING:
    from fedray.config import Config

ACCOUNTANT = "RDP (Mironov et al. 2019), converted by Canonne et al. 2020"


@dataclass(frozen=True)
class Release:
    """The noisy sum of one round, as an accountant sees it.

    multiplier: standard deviation of the noise, over the norm that no update exceeds;  clients: N;  size: how many
    take part on average;  rate: q, where each takes part with that probability on its own (1: all do); None where
    `size` of them are drawn without replacement.
    """

    multiplier: float
    clients: int
    size: float
    rate: float | None

    @property
    def neighbours(self) -> str:
        """What two federations differ in, that ε says are hard to tell apart."""
        return "one client replaced by another" if self.rate is None else "one client more or less"

    @property
    def in_sight(self) -> Release:
        """The release for those who know which clients take part: no draw hides one, which may be in every round."""
        multiplier = self.multiplier / 2 if self.rate is None else self.multiplier
        return replace(self, multiplier=multiplier, size=self.clients, rate=1.0)

    @property
    def event(self) -> Any:
        """The release in dp-accounting's terms. A replaced client moves the sum by up to twice the norm."""
        from dp_accounting import dp_event

        if self.rate is None:
            gaussian = dp_event.GaussianDpEvent(self.multiplier / 2)
            return dp_event.SampledWithoutReplacementDpEvent(self.clients, int(self.size), gaussian)
        return dp_event.PoissonSampledDpEvent(self.rate, dp_event.GaussianDpEvent(self.multiplier))


def release_of(config: Config) -> Release | None:
    """Return what a round of a run releases of its clients through noise; None without.

    Raises:
        UserError: no noise reaches --target-epsilon.
    """
    noise = next((link for link in config.wire if link.private), None)
    if noise is None:
        return None
    size = config.drawn.expected(config.clients)
    rate = 1.0 if size == config.clients else config.drawn.rate
    release = Release(noise.multiplier or 0.0, config.clients, size, rate)
    if noise.multiplier is not None or config.target_epsilon is None:
        return release
    found = multiplier_for(release, config.rounds, config.target_epsilon, config.delta)
    return replace(release, multiplier=found)


def epsilon(releases: Mapping[Release, int], delta: float, orders: Sequence[float] | None = None) -> float:
    """Return ε at δ of so many of each release; infinite without noise.

    Args:
        orders: of Rényi divergence, above 1; by default dp-accounting's.
    """
    if not releases:
        return 0.0
    if any(release.multiplier == 0 for release in releases):
        return math.inf
    return _epsilon(tuple(sorted(releases.items(), key=str)), delta, orders and tuple(orders))


@cache
def _epsilon(releases: tuple[tuple[Release, int], ...], delta: float, orders: tuple[float, ...] | None) -> float:
    accountant = _accountant(releases[0][0], orders)
    for release, count in releases:
        accountant.compose(release.event, count)
    return float(accountant.get_epsilon(delta))


def exact_epsilon(releases: Mapping[Release, int], delta: float) -> float | None:
    """Return ε at δ from privacy loss distributions, rounded up; None for cohorts that these do not know."""
    accountant = _losses(releases)
    return None if accountant is None else float(accountant.get_epsilon(delta))


def exact_delta(releases: Mapping[Release, int], epsilon: float) -> float | None:
    """Return δ at ε from privacy loss distributions, rounded up; None for cohorts that these do not know."""
    accountant = _losses(releases)
    return None if accountant is None else float(accountant.get_delta(epsilon))


def _losses(releases: Mapping[Release, int]) -> Any:
    if any(release.rate is None or release.multiplier == 0 for release in releases):
        return None
    _check_installed()
    from dp_accounting import pld

    accountant = pld.PLDAccountant()
    for release, count in releases.items():
        accountant.compose(release.event, count)
    return accountant


@cache
def multiplier_for(release: Release, times: int, target: float, delta: float) -> float:
    """Return the least noise, of multiplier σ in place of the release's, with which so many of it spend ε at δ.

    Raises:
        UserError: no noise reaches it.
    """
    _check_installed()
    import dp_accounting
    from dp_accounting.mechanism_calibration import NoBracketIntervalFoundError

    def event(multiplier: float) -> Any:
        return dp_accounting.SelfComposedDpEvent(replace(release, multiplier=multiplier).event, times)

    try:
        return float(dp_accounting.calibrate_dp_mechanism(
            lambda: _accountant(release, None), event, target, delta, dp_accounting.LowerEndpointAndGuess(0.01, 2.0)
        ))  # fmt: skip
    except (ValueError, NoBracketIntervalFoundError):
        raise UserError(
            f"--target-epsilon {target:g}: no noise reaches it in {times:,} noisy sums at --delta {delta:g}; raise it."
        ) from None


def rounds_within(release: Release, most: float, delta: float, rounds: int) -> int:
    """Return how many rounds, of so many, spend no more than that ε at δ."""
    return bisect.bisect_right(range(1, rounds + 1), most, key=lambda count: epsilon({release: count}, delta))


def _accountant(release: Release, orders: tuple[float, ...] | None) -> Any:
    _check_installed()
    from dp_accounting import NeighboringRelation, rdp

    relation = NeighboringRelation.REPLACE_ONE if release.rate is None else NeighboringRelation.ADD_OR_REMOVE_ONE
    return rdp.RdpAccountant(orders, relation)


def _check_installed() -> None:
    """Raise `UserError` without dp-accounting; silence its warnings of orders that do not converge and are left out."""
    try:
        import dp_accounting  # noqa: F401
        from absl import logging
    except ImportError:
        raise UserError("noise is accounted for by dp-accounting; install it: pip install 'fedray[privacy]'.") from None
    logging.set_verbosity(logging.ERROR)

"""Accounting through a run's settings, against published numbers and other libraries'."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import special
from scipy.stats import norm

from fedray.config import Config
from fedray.privacy import Release, epsilon, exact_delta, exact_epsilon, multiplier_for, release_of, rounds_within

INTEGERS = [*range(2, 257)]
GAUSSIAN = Release(1.0, 10, 10, 1.0)


def spent(sigma, rate, rounds, delta, clients=1000, **options):
    config = Config(
        clients=clients, cohort=f"poisson:{rate}", wire=f"clip:1,noise:{sigma}", rounds=rounds, local_steps=1,
        delta=delta,
    )  # fmt: skip
    return epsilon({release_of(config): config.rounds}, config.delta, **options)


@pytest.mark.parametrize(
    ("sigma", "rate", "rounds", "expected"),
    [(4, 0.01, 10_000, 1.035), (1.1, 0.01, 10_000, 5.632)],
)
def test_rdp_of_poisson_cohorts(sigma, rate, rounds, expected):
    assert round(spent(sigma, rate, rounds, 1e-5), 3) == expected


@pytest.mark.parametrize(
    ("sigma", "rate", "rounds", "expected"),
    [(4, 0.01, 40_000, 2.213), (1.1, 0.01, 10_000, 5.654)],
)
def test_rdp_of_whole_orders(sigma, rate, rounds, expected):
    """Published from whole orders of divergence; ours are closer, so what they spend is never more."""
    assert round(spent(sigma, rate, rounds, 1e-5, orders=INTEGERS), 3) == expected
    assert spent(sigma, rate, rounds, 1e-5) <= expected


@pytest.mark.parametrize(("sigma", "expected"), [(4, 1.259), (1.1, 6.280)])
def test_the_classic_conversion_proves_less(sigma, expected):
    """Published for q = 0.01 and 10,000 rounds is what the same divergences give by Mironov 2017, proposition 3."""
    delta, found = 1e-5, []
    for order in INTEGERS:
        ours = spent(sigma, 0.01, 10_000, delta, orders=[order])
        divergence = ours - np.log1p(-1 / order) + np.log(delta * order) / (order - 1)  # back from the conversion
        found.append(divergence - np.log(delta) / (order - 1))
    assert round(min(found), 3) == expected > spent(sigma, 0.01, 10_000, delta)


def test_fractional_orders_are_bounded_from_above():
    """7.32911117143 is published of the same orders; ours is 7.32933.

    At a fractional order α the divergence is a series, whose terms alternate in sign beyond the α-th (Mironov, Talwar
    and Zhang 2019, section 3.3). Opacus adds them with their signs, as below; dp-accounting adds their absolute values,
    an upper bound. At whole orders the two agree.
    """
    rate, sigma, rounds, delta = 0.04, 1.5, 2250, 1e-5

    def epsilon_at(order, divergence):
        return rounds * divergence / (order - 1) + np.log1p(-1 / order) - np.log(delta * order) / (order - 1)

    def signed(order):
        z0, i = sigma**2 * np.log(1 / rate - 1) + 0.5, np.arange(60)
        j = order - i
        below = j * np.log1p(-rate) + i * np.log(rate) + (i * i - i) / (2 * sigma**2)
        above = i * np.log1p(-rate) + j * np.log(rate) + (j * j - j) / (2 * sigma**2)
        below, above = below + special.log_ndtr((z0 - i) / sigma), above + special.log_ndtr((j - z0) / sigma)
        return np.log(np.sum(special.binom(order, i) * (np.exp(below) + np.exp(above))))

    def integrated(order):
        x = np.linspace(-40, 60, 40_001)
        ratio = np.log1p(rate * np.expm1((2 * x - 1) / (2 * sigma**2)))
        return np.log(np.trapezoid(norm.pdf(x, scale=sigma) * np.exp(order * ratio), x))

    orders = [1 + x / 10 for x in range(15, 60)]
    assert min(epsilon_at(order, signed(order)) for order in orders) == pytest.approx(7.32911117143, abs=1e-10)
    assert signed(3.9) == pytest.approx(integrated(3.9), rel=1e-9)
    ours = spent(sigma, rate, rounds, delta)
    assert 7.32911117143 < ours == pytest.approx(7.32933, abs=5e-6)
    assert spent(sigma, rate, rounds, delta, orders=[4]) == pytest.approx(epsilon_at(4, signed(4)), rel=1e-12)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [(1, 0.697), (10, 0.700), (100, 0.725), (1000, 0.774), (10_000, 0.884), (100_000, 1.899), (1_000_000, 6.830)],
)
def test_a_hundred_of_a_hundred_thousand_clients(rounds, expected):
    orders = [1.25, 1.5, 1.75, 2, 2.25, 2.5, 3, 3.5, 4, 4.5, *range(5, 64), 128, 256, 512]  # as published
    found = spent(1.0, 0.001, rounds, 1e5**-1.1, clients=100_000, orders=orders)
    assert round(found, 3) == expected
    assert spent(1.0, 0.001, rounds, 1e5**-1.1, clients=100_000) <= found + 1e-6


def test_privacy_loss_distributions():
    """Published for 2,249 rounds is 6.777, the upper end of an interval of ± 0.01 (Gopi et al. 2021, as in Opacus).

    dp-accounting's grid is of 1e-4, rounded up: its upper bound lies in the middle of that interval.
    """
    release = Release(1.5, 1000, 40, 0.04)
    found = exact_epsilon({release: 2249}, 1e-5)
    assert found == pytest.approx(6.777 - 0.01, abs=5e-4)
    assert found < epsilon({release: 2249}, 1e-5)
    three = exact_delta({replace(GAUSSIAN, multiplier=3**0.5): 3}, 1.0)
    # Three of σ = √3 are one of σ = 1 (Balle and Wang 2018, theorem 8).
    assert three == pytest.approx(norm.cdf(0.5 - 1) - np.e * norm.cdf(-0.5 - 1), abs=1e-5)
    assert round(three, 5) == round(0.126936, 5)
    assert exact_delta({Release(0.5, 10, 2, 0.2): 3}, 1.0) == pytest.approx(0.15594, abs=1e-5)


def test_the_noise_for_a_target_spends_it():
    """A Gaussian at (1, 1e-6) needs σ = 4.530877117, by Rényi divergence of the best order."""
    assert multiplier_for(GAUSSIAN, 1, 1.0, 1e-6) == pytest.approx(4.530877117, rel=1e-6)
    config = Config(
        clients=100, cohort="poisson:0.1", wire="clip:1,noise", rounds=50, local_steps=1, target_epsilon=8.0, delta=1e-5
    )  # fmt: skip
    release = release_of(config)
    assert epsilon({release: 50}, 1e-5) == pytest.approx(8, abs=1e-4)
    assert epsilon({release: 50}, 1e-5) <= 8
    assert rounds_within(release, 8.0, 1e-5, 50) == 50
    assert rounds_within(release, 7.99, 1e-5, 50) == 49


def test_cohorts_are_accounted_for_as_what_they_are():
    """All clients: no amplification. A fixed number: without replacement, for a client that is replaced."""
    base = Config(clients=100, wire="clip:1,noise:2", rounds=20, local_steps=1)
    everyone, some = (release_of(replace(base, fraction=fraction)) for fraction in (1.0, 0.1))
    assert (everyone.rate, everyone.neighbours) == (1.0, "one client more or less")
    assert (some.rate, some.size, some.neighbours) == (None, 10, "one client replaced by another")
    poisson = release_of(replace(base, cohort="poisson:0.1"))
    assert epsilon({poisson: 20}, 1e-5) < epsilon({some: 20}, 1e-5)
    # Drawing all of them without replacement is the Gaussian mechanism for updates twice as far apart.
    twice = epsilon({replace(everyone, multiplier=1.0): 20}, 1e-5)
    assert epsilon({replace(some, size=100): 20}, 1e-5) == pytest.approx(twice, rel=0.05)
    assert exact_epsilon({some: 20}, 1e-5) is None


def test_without_noise_there_is_no_bound():
    assert epsilon({replace(GAUSSIAN, multiplier=0.0): 1}, 1e-5) == float("inf")
    assert epsilon({}, 1e-5) == 0

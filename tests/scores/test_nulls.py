"""Every statistic of `fedray audit`, simulated where nothing leaks: its p is uniform.

A statistic that counts takes few values, and so does its p: then a draw makes the steps between them even.
"""

import numpy as np
import pytest
from scipy import stats

from fedray.federation.uploads import judged
from fedray.scores import membership
from fedray.scores.canaries import chance, leak
from fedray.scores.membership import attack, rates_of
from fedray.scores.nearest import copies, excess, nearest, nearest_features

pytestmark = pytest.mark.slow
CHANCE = 1e-3  # of a false alarm, if the seeds were others


def assert_uniform(found):
    assert stats.kstest(found, "uniform").pvalue > CHANCE


# Membership inference


def losses_of_clients(rng, levels):
    """Losses of clients of 2 to 24 examples, each at its own level, of which it holds out other shares than others."""
    members, others, whose = [], [], ([], [])
    for client, level in enumerate(rng.normal(0, levels, 30)):
        size = 2 + 22 * (client % 2) * (level > 0)  # the large ones have higher losses
        held_out = rng.permutation(size) < (1 if size == 2 else 3)
        losses = level + rng.exponential(size=size)
        for of, kind, into in ((members, ~held_out, 0), (others, held_out, 1)):
            of.append(losses[kind])
            whose[into].append(np.full(kind.sum(), client))
    return np.concatenate(members), np.concatenate(others), tuple(map(np.concatenate, whose))


@pytest.mark.parametrize("levels", [0, 3])
def test_the_area_of_examples_of_clients_that_differ(levels):
    rng, found, unaware = np.random.default_rng(0), [], []
    for _ in range(400):
        members, others, clients = losses_of_clients(rng, levels)
        found.append(attack(members, others, clients).p)
        unaware.append(attack(members, others).p)
    assert_uniform(found)
    assert (stats.kstest(unaware, "uniform").pvalue < 1e-6) == (levels > 0)  # so that it matters


@pytest.mark.parametrize("rate", [0.01, 0.001])
@pytest.mark.parametrize("m", [1000, 1500])
def test_true_positives_of_one_distribution(rate, m):
    """How many of m lie below the k-th of 1,000 others is beta-binomial."""
    rng, found, k = np.random.default_rng(1), [], round(1000 * rate)
    for _ in range(200):
        value, _, _, high = rates_of(rng.normal(size=m), rng.normal(size=1000))[rate]
        low = stats.betabinom.sf(round(value * m), m, k, 1001 - k)
        found.append(rng.uniform(low, high))
    assert_uniform(found)


@pytest.mark.parametrize(("clients", "size", "levels"), [(10, 100, 0), (10, 100, 5), (100, 10, 5), (500, 2, 20)])
def test_true_positives_of_clients_that_differ(clients, size, levels, monkeypatch):
    """p is of draws within clients; those of each kind in a client are exchangeable, so it is never too small."""
    monkeypatch.setattr(membership, "RESAMPLES", 99)
    rng, found = np.random.default_rng(2), []
    whose = np.repeat(np.arange(clients), size)
    for _ in range(60):
        level = rng.normal(0, levels, clients)[:, None]
        members, others = ((level + rng.normal(size=(clients, size))).ravel() for _ in range(2))
        found.append(rates_of(members, others, (whose, whose))[0.01][3])
    assert stats.kstest(found, "uniform", alternative="greater").pvalue > CHANCE  # of more small ones than there are
    assert min(found) < 0.2
    assert np.mean(found) < 0.65


def test_uploads(monkeypatch):
    """The mean area over clients of any size; and the largest of c clients, whose p is c times the least of theirs."""
    monkeypatch.setattr(membership, "RESAMPLES", 1)  # of intervals and rates
    rng, means, largest = np.random.default_rng(3), [], []
    for _ in range(300):
        sizes = [6, 30, 30, 40, 50, 60, 8, 12]
        unequal = {client: rng.normal(5 * client, 1 + client, (2, size)) for client, size in enumerate(sizes)}
        means.append(judged(unequal, rng).p)
        equal = {client: rng.normal(5 * client, 1 + client, (2, 40)) for client in range(8)}
        largest.append(judged(equal, rng).p_largest)
    assert_uniform(means)
    within = np.array([1 - (1 - p / 8) ** 8 for p in largest if p < 1])  # the least of eight that are uniform
    assert len(within) == pytest.approx(300 * (1 - (7 / 8) ** 8), abs=4 * (300 * 0.66 * 0.34) ** 0.5)
    assert_uniform(within / (1 - (7 / 8) ** 8))


# Canaries


def test_canaries():
    """The area, the exposure, and the number of right guesses from which the bound on ε follows."""
    rng, areas, exposures, guesses = np.random.default_rng(4), [], [], []
    for _ in range(200):
        losses, planted = rng.exponential(size=64), rng.random(64) < 0.5
        found = leak(losses, planted, 1e-5, rng)
        areas.append(found.attack.p)
        exposures.append(found.p)
        order = np.argsort(losses)
        right = int(planted[order[:16]].sum() + (~planted[order[-16:]]).sum())
        high, low = chance(64, 32, right, 0.0, 0.0), chance(64, 32, right + 1, 0.0, 0.0)
        guesses.append(rng.uniform(low, high))
    for each in (areas, exposures, guesses):
        assert_uniform(each)


# Copies


def of_pixels(images, others):
    return nearest(images, others, np.arange(len(others)), mirrored=False)[1]


def of_features(images, others):
    mixed = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    first, second = ((each.reshape(len(each), 16) / 255).astype(np.float32) @ mixed for each in (images, others))
    return nearest_features(first, second)[1]


@pytest.mark.parametrize("distances", [of_pixels, of_features])
@pytest.mark.parametrize("m", [19, 59])
def test_copies(distances, m):
    """Samples and images held out are of one distribution: p is uniform, and the share is the nominal 5 %.

    Distances to the same images that were trained on are as independent as samples are, given those.
    """
    rng, found, shares = np.random.default_rng(5), [], []
    place = (m + 1) // 20
    for _ in range(300):
        images = rng.integers(0, 256, (50 + m + 60, 1, 4, 4), np.uint8)
        trained, real, drawn = np.split(images, [50, 50 + m])
        distance, expected = distances(drawn, trained), distances(real, trained)
        share, _, threshold, nominal = copies(distance, expected)
        assert nominal == 0.05
        assert share == (distance <= threshold).mean()
        high, within = excess(distance, expected), int((distance < np.sort(expected)[place - 1]).sum())
        found.append(rng.uniform(stats.betabinom.sf(within, 60, place, m + 1 - place), high))
        shares.append(share)
    assert_uniform(found)
    assert np.mean(shares) == pytest.approx(0.05, abs=4 * np.std(shares) / 300**0.5)

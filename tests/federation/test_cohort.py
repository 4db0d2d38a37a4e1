import json
from dataclasses import replace

import numpy as np
import pytest
from runs import train
from scipy import stats

from fedray.algorithms.cohorts import Fixed, Poisson
from fedray.config import Config
from fedray.errors import RunError, UserError
from fedray.federation.cohort import cohort_of
from fedray.presets import PRESETS
from fedray.seeds import generator


def test_cohorts_are_drawn_without_replacement_each_client_as_often_as_the_others():
    assert Fixed().draw(5, generator(0)) == [0, 1, 2, 3, 4]
    drawn = [Fixed(0.3).draw(10, generator(0, round)) for round in range(2000)]
    assert all(len(set(clients)) == 3 and clients == sorted(clients) for clients in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=10)
    assert np.abs(counts - 600).max() < 5 * (2000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize(
    ("clients", "fraction", "size"),
    [
        (5, 1.0, 5),
        (1000, 0.001, 1),
        (1000, 0.0001, 1),
        (10, 0.3, 3),
        (5, 0.5, 3),
        (3, 0.5, 2),
        (3, 0.7, 2),
        (1, 0.1, 1),
    ],
)
def test_a_cohort_is_a_fraction_of_the_clients_halves_up_and_at_least_one(clients, fraction, size):
    config = replace(PRESETS["digits"], clients=clients, fraction=fraction)
    assert config.cohort_size == size
    assert len(cohort_of(config, 0)) == size


def test_the_only_client_is_the_cohort_of_every_round():
    config = replace(PRESETS["digits"], clients=5, fraction=0.6, only_client=2)
    assert [cohort_of(config, number) for number in range(3)] == [[2]] * 3
    assert config.cohort_size == 1


def test_poisson_cohorts_draw_each_client_on_its_own():
    """Sizes are binomial, and two clients come together as often as by chance."""
    drawn = [Poisson(0.3).draw(10, generator(0, round)) for round in range(4000)]
    sizes = np.bincount(list(map(len, drawn)), minlength=11)
    expected = stats.binom.pmf(np.arange(11), 10, 0.3) * 4000
    assert stats.chisquare(np.r_[sizes[:7], sizes[7:].sum()], np.r_[expected[:7], expected[7:].sum()]).pvalue > 1e-3
    assert sizes[0] > 0
    counts = np.bincount(np.concatenate(drawn).astype(int), minlength=10)
    assert np.abs(counts - 1200).max() < 5 * (4000 * 0.3 * 0.7) ** 0.5
    together = sum({2, 7} <= set(clients) for clients in drawn)
    assert abs(together - 360) < 5 * (4000 * 0.09 * 0.91) ** 0.5
    assert all(clients == sorted(clients) for clients in drawn)
    assert Poisson(1.0).draw(5, generator(0)) == [0, 1, 2, 3, 4]


def test_a_fraction_is_short_for_a_fixed_cohort():
    short = replace(PRESETS["digits"], clients=10, fraction=0.3)
    long = replace(PRESETS["digits"], clients=10, cohort="fixed:0.3")
    assert [cohort_of(short, number) for number in range(5)] == [cohort_of(long, number) for number in range(5)]
    for config in (short, long, replace(short, fraction=1.0, cohort="poisson:0.25")):
        assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert replace(short, fraction=1.0, cohort="poisson:0.25").to_json()["cohort"] == "poisson:0.25"
    assert (short.least, replace(short, fraction=1.0, cohort="poisson:0.25").least) == (1, 0)


@pytest.mark.parametrize("form", ["poisson:0", "poisson:1.5", "fixed:0", "fixed:2"])
def test_rates_and_fractions_that_are_none(form):
    with pytest.raises(UserError, match="it must be above 0 and at most 1|the rate must be above 0 and at most 1"):
        Config(local_steps=1, cohort=form)


def test_drawing_too_few_clients_stops_a_run(toy_config, tmp_path):
    config = toy_config(cohort="poisson:0.5", min_clients=2, rounds=20, evaluate_samples=0)
    with pytest.raises(RunError, match=r"only [01] clients were drawn, fewer than --min-clients 2"):
        train(config, tmp_path / "run")

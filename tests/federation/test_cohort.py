from dataclasses import replace

import numpy as np
import pytest

from fedray.federation import cohort
from fedray.federation.plan import cohort_of
from fedray.presets import PRESETS
from fedray.seeds import generator


def test_cohorts_are_drawn_without_replacement_each_client_as_often_as_the_others():
    assert cohort.choose(5, 5, generator(0)) == [0, 1, 2, 3, 4]
    drawn = [cohort.choose(10, 3, generator(0, round)) for round in range(2000)]
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

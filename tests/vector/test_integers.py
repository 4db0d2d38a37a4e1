"""Sums of integers, against Python's own (exact, unbounded) integers."""

from fractions import Fraction

import numpy as np
import pytest

from fedray.vector.integers import CHUNK, add_term, mean_of, to_floats


@pytest.mark.parametrize("weight", [1, 57, 10**9 // 3])
@pytest.mark.parametrize("deviation", [1e-6, 0.05, 300.0])
def test_a_term_is_the_nearest_integer(weight, deviation):
    rng = np.random.default_rng(0)
    x = np.clip(rng.normal(0, deviation, 400), -1023, 1023).astype(np.float32)
    x[:3] = 0.0, -0.0, 0.5
    scale = weight * 2.0 ** (52 - weight.bit_length())
    total = np.arange(400)
    add_term(total, x, scale)
    assert total.tolist() == [k + round(Fraction(float(v)) * Fraction(scale)) for k, v in enumerate(x)]


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 5])
def test_any_length(size):
    x = np.random.default_rng(1).normal(size=size).astype(np.float32)
    whole, parts = np.zeros(size, np.int64), np.zeros(size, np.int64)
    add_term(whole, x, 2.0**40)
    for index in range(0, size, 1000):
        add_term(parts[index : index + 1000], x[index : index + 1000], 2.0**40)
    assert np.array_equal(whole, parts)


def test_back_to_floats_and_their_mean():
    total = np.random.default_rng(2).integers(-(2**61), 2**61, 2 * CHUNK + 5)
    expected = [float(value) * 2.0**-40 for value in total.tolist()]
    floats = to_floats(total, 2.0**-40)
    assert floats.tolist() == expected
    assert mean_of(floats, 57).tolist() == [float(np.float32(value / 57)) for value in expected]

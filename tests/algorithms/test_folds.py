"""The mean as a sum of integers: any order, grouping and tree give the same bits, and these are the right ones."""

from fractions import Fraction

import made
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.algorithms.folds import Collect, Mean

CLIENTS, SIZE = 20, 2000


def cohort(deviation, weights, size=SIZE, seed=0):
    """A round, and what its clients send."""
    rng = np.random.default_rng(seed)
    vectors = [torch.from_numpy(rng.normal(0, deviation, size).astype(np.float32)) for _ in weights]
    round = made.round_of(dict(enumerate(weights)))
    return round, made.uploads(vectors, round, [{"steps": float(k)} for k in range(len(weights))])


def unequal(seed=1):
    return np.random.default_rng(seed).integers(3, 400, CLIENTS).tolist()


def rounded(uploads, weights):
    """The correctly rounded weighted mean, from exact fractions."""
    exact = [sum(w * Fraction(float(u.tensors["model"][i])) for u, w in zip(uploads, weights, strict=True))
             for i in range(len(uploads[0].tensors["model"]))]  # fmt: skip
    return np.array([float(np.float32(float(value / sum(weights)))) for value in exact]), exact


def tree(partials, round, fold, choose):
    """Merge partials in a random tree."""
    partials = list(partials)
    while len(partials) > 1:
        first = partials.pop(choose(len(partials)))
        second = partials.pop(choose(len(partials)))
        partials.append(fold.merge(first, second, round))
    return partials[0]


class Middle(Collect):
    def combine(self, tensors):
        return torch.stack(tensors).median(0).values


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([Mean(), Middle()]))
def test_any_order_any_grouping_any_tree(random, fold):
    round, uploads = cohort(0.05, unequal()[: random.randint(1, CLIENTS)], size=50)
    expected = fold.result(made.added(uploads, round, fold), round)
    shuffled = random.sample(uploads, len(uploads))
    cuts = sorted(random.choices(range(len(uploads) + 1), k=random.randint(0, len(uploads))))
    groups = [shuffled[a:b] for a, b in zip([0, *cuts], [*cuts, len(uploads)], strict=True)]
    partials = [made.added(group, round, fold) for group in groups]
    found = fold.result(tree(partials, round, fold, random.randrange), round)
    assert found.sums["model"].numpy().tobytes() == expected.sums["model"].numpy().tobytes()
    assert (found.weights, found.rows) == (expected.weights, expected.rows)


def test_it_is_the_correctly_rounded_mean():
    weights = unequal()
    round, uploads = cohort(0.05, weights)
    right, _ = rounded(uploads, weights)
    found = made.fold([u.tensors["model"] for u in uploads], round).mean("model").numpy()
    assert (found == right).mean() >= 0.999


def test_of_tiny_weights_it_is_as_good_as_float32():
    weights = unequal()
    round, uploads = cohort(1e-5, weights)
    _, exact = rounded(uploads, weights)
    found = made.fold([u.tensors["model"] for u in uploads], round).mean("model").numpy()
    for value, mean in zip(found, exact, strict=True):
        true = mean / sum(weights)
        own = abs(np.spacing(np.float32(float(true)))) / 2  # float32's rounding of the true mean
        assert abs(float(Fraction(float(value)) - true)) <= own + CLIENTS * 2.0**-53  # half a unit for each client


@pytest.mark.parametrize("weights", [[10**9, 1], [10**9 // 3] * 3, [1]])
def test_large_planned_weights(weights):
    round, uploads = cohort(1000.0, weights, size=200)
    for upload in uploads:
        upload.tensors["model"].clamp_(-1023.9, 1023.9)
    right, _ = rounded(uploads, weights)
    found = made.fold([u.tensors["model"] for u in uploads], round).mean("model").numpy()
    assert np.abs(found - right).max() <= 2.0**-14  # float32's spacing at 1000


def test_failures_change_nothing_but_the_terms():
    """The unit in which values are rounded follows from the plan, so what the others add is what they always add."""
    round, uploads = cohort(0.05, unequal(), size=100)
    fold, some = Mean(), uploads[:7]
    left = made.added(uploads[7:], round, fold)
    both = fold.merge(made.added(some, round, fold), left, round)
    difference = both.sums["model"] - left.sums["model"]
    assert np.array_equal(difference, made.added(some, round, fold).sums["model"])


def test_what_arrives_by_ray_is_not_written_to():
    round, uploads = cohort(0.05, [1, 2, 3, 4], size=10)
    fold = Mean()
    arrived = made.added(uploads[:2], round, fold)
    arrived.sums["model"].flags.writeable = False
    partial = fold.merge(fold.start(round), arrived, round)
    for upload in uploads[2:]:
        partial = fold.merge(partial, made.added([upload], round, fold), round)
    assert np.array_equal(partial.sums["model"], made.added(uploads, round, fold).sums["model"])

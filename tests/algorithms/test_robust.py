"""Robust folds: numbers of their papers and of SciPy, invariances, and what one malicious client can do."""

import made
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

from fedray.algorithms.folds import Mean
from fedray.algorithms.robust import Krum, Median, MultiKrum, NormBound, Trimmed
from fedray.errors import RunError, UserError
from fedray.menus import FOLDS

ROBUST = [Median(), Trimmed(0.2), Krum(2), MultiKrum(2), MultiKrum(1, 4)]


def folded(fold, values, weights=None):
    """What a fold makes of vectors of float32."""
    vectors = [torch.tensor(value, dtype=torch.float32).reshape(-1) for value in values]
    return made.fold(vectors, made.round_of(dict(enumerate(weights or [1] * len(vectors)))), fold).mean("model")


def honest(clients=9, size=1000, seed=0):
    """Models that differ by a hundredth of their length."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=size) + 0.01 * rng.normal(size=(clients, size))).astype(np.float32)


@pytest.mark.parametrize(
    ("fold", "values", "result"),
    [
        (Krum(1), [[0.2] * 4, [0.7] * 4, [1.0] * 4] * 4, [0.7] * 4),
        (MultiKrum(0, 2), [0.2, 0.5, 1.0], [0.35]),
        (MultiKrum(1, 8), [0.2, 0.5, 1.0] * 4, [0.35]),
        (Trimmed(0.25), [0.5, 1, 2, 100], [1.5]),
        (Median(), [[1, 0.2, 0.5, 1], [0.2, 0.5, 1, 0.2], [0.5, 1, 0.2, 0.5]], [0.5] * 4),
        (Median(), [1, 2, 10, 3], [2.5]),
    ],
)
def test_numbers_worked_out_by_hand(fold, values, result):
    torch.testing.assert_close(folded(fold, values), torch.tensor(result))


@pytest.mark.parametrize("clients", [5, 8, 10])
def test_against_numpy_and_scipy_over_several_chunks(clients, monkeypatch):
    monkeypatch.setattr("fedray.algorithms.robust.CHUNK", 64)
    models = honest(clients)
    median = np.median(models.astype(np.float64), axis=0).astype(np.float32)
    assert np.array_equal(folded(Median(), models).numpy(), median)
    np.testing.assert_allclose(folded(Trimmed(0.2), models), trim_mean(models.astype(float), 0.2), rtol=1e-6)
    mean = models.astype(np.float64).mean(0)
    np.testing.assert_allclose(folded(Trimmed(0.0), models), mean, rtol=1e-6)


@pytest.mark.parametrize(("f", "m"), [(0, 3), (1, 4), (2, 1), (3, 6)])
def test_krum_against_its_definition(f, m, monkeypatch):
    """Blanchard et al. 2017: s(i) = Σ over the n − f − 2 nearest j of ‖V_i − V_j‖²."""
    monkeypatch.setattr("fedray.algorithms.robust.CHUNK", 64)
    models = honest(9, 300, seed=f)
    models[4] += 100
    whole = models.astype(np.float64)
    scores = [sorted(((a - b) ** 2).sum() for j, b in enumerate(whole) if j != i) for i, a in enumerate(whole)]
    order = sorted(range(9), key=lambda i: sum(scores[i][: 9 - f - 2]))
    found = folded(MultiKrum(f, m), models)
    np.testing.assert_allclose(found, whole[sorted(order[:m])].mean(0), rtol=1e-6)
    assert np.array_equal(folded(Krum(f), models), models[order[0]])


def test_distances_are_over_all_tensors_and_not_by_products():
    """A second tensor decides; and beside an upload of 10^8, honest ones that differ by 10^−4 keep their order."""
    shifts = [0, 0, 0, 5, 5]
    sent = [{"model": torch.ones(2), "control": torch.full((2,), float(shift))} for shift in shifts]
    result = made.fold(sent, made.round_of(dict.fromkeys(range(5), 3)), Krum(1))
    assert result.mean("control").tolist() == [0, 0]
    assert result.weights == {"model": 15, "control": 5}
    assert result.survivors == [0, 1, 2, 3, 4]
    models = [[1e8] * 50, *([1 + k * 1e-4] * 50 for k in (0, 1, 2, 9))]
    assert folded(Krum(1), models)[0].item() == pytest.approx(1.0001, abs=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(ROBUST))
def test_any_order_any_grouping(random, fold):
    round = made.round_of(dict.fromkeys(range(9), 1))
    uploads = made.uploads(list(torch.from_numpy(honest(size=20))), round)
    expected = fold.result(made.added(uploads, round, fold), round).sums["model"]
    shuffled = random.sample(uploads, len(uploads))
    cut = random.randint(0, len(uploads))
    first, second = (made.added(part, round, fold) for part in (shuffled[:cut], shuffled[cut:]))
    assert torch.equal(fold.result(fold.merge(first, second, round), round).sums["model"], expected)


@pytest.mark.parametrize("fold", ROBUST)
def test_moves_with_the_models_and_ignores_examples(fold):
    models = np.round(honest() * 2**10) / 2**10  # exact also with 8 added
    torch.testing.assert_close(folded(fold, models + 8), folded(fold, models) + 8, rtol=2e-7, atol=0)
    torch.testing.assert_close(folded(fold, models, weights=range(1, 10)), folded(fold, models), rtol=2e-7, atol=0)


@pytest.mark.parametrize("fold", [*ROBUST, NormBound(1.0)])
def test_one_of_ten_with_large_noise_destroys_the_mean_alone(fold):
    models = np.concatenate([honest(), 1e6 * np.random.default_rng(1).normal(size=(1, 1000))])
    right, reach = models[:9].mean(0), 0.0
    if fold == NormBound(1.0):  # of changes from the right model; it is moved by a tenth of its norm at the most
        models, right, reach = models - right, 0 * right, 0.1 / np.sqrt(1000)
    assert np.abs(folded(Trimmed(0.0), models) - right).mean() > 1e4
    assert np.abs(folded(fold, models).numpy() - right).mean() < 0.01 + reach


def test_norm_bounding_is_the_mean_of_shortened_changes():
    """Sun et al. 2019: Δ / max(1, ‖Δ‖ / M)."""
    changes, weights = honest(4).astype(np.float64) * [[0.01], [0.02], [0.1], [1.0]], [1, 2, 3, 4]
    norms = np.linalg.norm(changes.astype(np.float32).astype(np.float64), axis=1)
    assert (norms > 1).tolist() == [False, False, True, True]
    expected = np.average(changes / np.maximum(1, norms)[:, None], axis=0, weights=weights)
    np.testing.assert_allclose(folded(NormBound(1.0), changes, weights), expected, rtol=1e-5, atol=1e-9)
    assert torch.equal(folded(NormBound(1e3), changes, weights), folded(Mean(), changes, weights))


@pytest.mark.parametrize(
    ("text", "least"),
    [("median", 1), ("trimmed:0.1", 10), ("trimmed:0.25", 4), ("trimmed:0.3", 4), ("trimmed:0", 1), ("krum:0", 3),
     ("krum:3", 9), ("multikrum:1", 5), ("multikrum:1:20", 21)],
)  # fmt: skip
def test_fewer_uploads_than_a_fold_needs_are_refused(text, least):
    fold = FOLDS.parse(text)
    assert (fold.least, FOLDS.form(fold)) == (least, text)
    if least > 1:
        with pytest.raises(RunError, match=f"needs {least}"):
            folded(fold, [1.0] * (least - 1))
    folded(fold, [1.0] * least)


@pytest.mark.parametrize("text", ["trimmed:0.5", "trimmed:-0.1", "krum:-1", "multikrum:1:0", "normbound:0", "krum"])
def test_wrong_values_are_refused(text):
    with pytest.raises(UserError, match=text):
        FOLDS.parse(text)

import numpy as np
import pytest
import torch

from fedray.data import digits
from fedray.scores.digits import WEIGHTS, DigitClassifier, classifier, score
from fedray.scores.frechet import frechet_distance


def eigenvalue_form(x, y):
    """Heusel et al. 2017, equation 6, by the eigenvalues of Σx Σy, in float64."""
    x, y = x.double().numpy(), y.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_x @ cov_y).real, 0))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots.sum()


@pytest.mark.parametrize(("n", "m", "d"), [(500, 700, 16), (40, 700, 64), (20, 30, 64)])
def test_factor_form_equals_eigenvalue_form(n, m, d):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=rng) @ torch.randn(d, d, generator=rng)
    y = torch.randn(m, d, generator=rng) * 3 + 1
    assert frechet_distance(x, y) == pytest.approx(eigenvalue_form(x, y), rel=3e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9)


def test_closed_form_in_one_dimension():
    # N(μ, σ²): (μ₁ − μ₂)² + (σ₁ − σ₂)²
    x, y = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [11.0]])
    assert frechet_distance(x, y) == pytest.approx(7.0**2 + (2**0.5 - 18**0.5) ** 2)


def test_equal_sets_have_no_distance_and_one_sample_none():
    x = torch.randn(100, 8)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(x[:1], x)


def test_shipped_classifier_knows_digits_from_noise():
    assert WEIGHTS.stat().st_size < 300_000
    assert sum(p.numel() for p in DigitClassifier().parameters()) == 38_282
    data = digits()
    images = torch.from_numpy(data.images)
    with torch.no_grad():
        accuracy = (classifier()(images).argmax(1).numpy() == data.labels).mean()
    assert accuracy > 0.98
    real = score(images)
    assert real["sure[digits]"] >= 0.95
    assert real["fd[digits]"] < 1e-6
    noise = score(torch.randint(256, (512, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8))
    assert noise["sure[digits]"] < 0.02
    assert noise["fd[digits]"] > 100 * noise["fd[digits]/real"]


def test_real_against_real_does_not_depend_on_the_samples():
    images = torch.from_numpy(digits().images)
    assert score(images[:512])["fd[digits]/real"] == score(images[512:1024])["fd[digits]/real"]

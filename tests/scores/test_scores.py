"""Scores against closed forms, float64 and independent implementations."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from fedray.data.sources import digits
from fedray.federation.sampling import Sampling
from fedray.scores import frechet, networks
from fedray.scores.digits import WEIGHTS, DigitClassifier, classifier, sure
from fedray.scores.frechet import Gaussian, frechet_distance, gaussian
from fedray.scores.kid import kernel_distance
from fedray.scores.nearest import copies, nearest
from fedray.scores.prdc import distances, manifold, prdc
from fedray.scores.reference import Reference
from fedray.scores.scoring import jackknife, score
from fedray.tasks.embedded import prompt


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def distance(x, y):
    return frechet_distance(gaussian(x), gaussian(y))


def reference(features):
    real = manifold(features)
    return Reference(features, gaussian(features), real.radii, key={"of": len(features)})


def eigenvalue_form(x, y):
    """Heusel et al. 2017, equation 6, by the eigenvalues of Σx Σy, in float64."""
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(cov_x @ cov_y).real, 0))
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * roots.sum()


# The Fréchet distance


@pytest.mark.parametrize(("n", "m", "d"), [(500, 700, 16), (40, 700, 64), (20, 30, 64)])
def test_factor_form_equals_eigenvalue_form(n, m, d):
    x, y = normal(0, n, d) @ normal(1, d, d), normal(2, m, d) * 3 + 1
    assert distance(x, y) == pytest.approx(eigenvalue_form(x, y), rel=3e-6)
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)


def test_fitted_in_parts_as_in_one(monkeypatch):
    x, y = normal(0, 1000, 12) * np.arange(1, 13) + 100, normal(1, 900, 12)
    whole = distance(x, y)
    monkeypatch.setattr(frechet, "ROWS", 7)
    assert distance(x, y) == pytest.approx(whole, rel=1e-10)
    factor = gaussian(x).factor
    assert factor.shape == (12, 12)
    np.testing.assert_allclose(factor.T @ factor, np.cov(x, rowvar=False), rtol=1e-10, atol=1e-10)


def test_closed_form_in_one_dimension():
    # N(μ, σ²): (μ₁ − μ₂)² + (σ₁ − σ₂)²
    x, y = np.array([[0.0], [2.0]]), np.array([[5.0], [11.0]])
    assert distance(x, y) == pytest.approx(7.0**2 + (2**0.5 - 18**0.5) ** 2)


def test_equal_sets_have_no_distance_and_one_image_none():
    x = normal(0, 100, 8)
    assert distance(x, x) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="at least two images"):
        gaussian(x[:1])
    with pytest.raises(ValueError, match="not finite"):
        gaussian(np.full((3, 2), np.nan))


@pytest.mark.parametrize(
    ("n", "d", "share"), [(64, 64, 0.17), (64, 192, 0.45), (64, 768, 0.73), (1000, 64, 0.01), (1000, 192, 0.025)]
)
def test_few_samples_of_the_truth_itself_have_a_distance(n, d, share):
    """The bias: draws from a Gaussian with a 1/k spectrum against that Gaussian, as a share of its trace."""
    spectrum = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    truth = Gaussian(torch.zeros(d, dtype=torch.float64), spectrum.sqrt().diag())
    drawn = [
        frechet_distance(gaussian(normal(seed, n, d) * spectrum.sqrt().numpy()), truth) for seed in range(8)
    ]  # fmt: skip
    assert np.mean(drawn) / spectrum.sum().item() == pytest.approx(share, abs=0.015)


def test_real_digits_against_real_digits_show_the_bias():
    features = digit_features()
    order = np.random.default_rng(0).permutation(len(features))
    few = np.mean([distance(features[order[k * 64 : k * 64 + 64]], features[order[640:]]) for k in range(10)])
    many = distance(features[order[:800]], features[order[800:]])
    assert few > 5 * many


# The kernel distance


def test_kernel_distance_equals_torch_fidelity():
    metric_kid = pytest.importorskip("torch_fidelity.metric_kid")
    x, y = normal(0, 300, 48).astype(np.float32), normal(1, 300, 48).astype(np.float32) * 1.1 + 0.1
    settings = dict(
        kid_subsets=3, kid_subset_size=300, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1.0, rng_seed=0, verbose=False,
    )  # fmt: skip
    theirs = metric_kid.kid_features_to_metric(torch.from_numpy(x), torch.from_numpy(y), **settings)
    mean, std = kernel_distance(x, y, 300, torch.Generator().manual_seed(0), subsets=3)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-5)
    assert std == pytest.approx(0, abs=1e-9)  # each subset is the whole set


def test_kernel_distance_is_unbiased():
    rng = torch.Generator().manual_seed(0)
    drawn = [kernel_distance(normal(2 * k, 60, 8), normal(2 * k + 1, 60, 8), 50, rng, 10)[0] for k in range(60)]
    assert abs(np.mean(drawn)) < 3 * np.std(drawn) / 60**0.5
    assert min(drawn) < 0
    with pytest.raises(ValueError, match="subsets have 61 images and there are 60"):
        kernel_distance(normal(0, 60, 8), normal(1, 99, 8), 61, rng)


# Precision, recall, density, coverage


def neighbours(real, drawn, k=5):
    """The definitions, by scikit-learn's neighbours."""
    of_real = NearestNeighbors(n_neighbors=k + 1).fit(real).kneighbors(real)[0][:, -1]
    of_drawn = NearestNeighbors(n_neighbors=k + 1).fit(drawn).kneighbors(drawn)[0][:, -1]
    apart = np.linalg.norm(real[:, None] - drawn[None], axis=2)
    return {
        "precision": (apart < of_real[:, None]).any(0).mean(),
        "recall": (apart < of_drawn[None]).any(1).mean(),
        "density": (apart < of_real[:, None]).sum() / (k * len(drawn)),
        "coverage": (apart < of_real[:, None]).any(1).mean(),
    }


def ours(real, drawn):
    real, drawn = real.astype(np.float32), drawn.astype(np.float32)
    fitted, drawn = manifold(real), torch.from_numpy(drawn)
    return prdc(distances(fitted.features, drawn), distances(drawn, drawn), fitted.radii)


def test_prdc_equals_its_definition_and_is_not_swapped():
    # Half of what is real, and sharply: precise, of low recall.
    real, drawn = normal(0, 300, 4), normal(1, 200, 4) * 0.4
    assert ours(real, drawn) == pytest.approx(neighbours(real, drawn))
    found, turned = ours(real, drawn), ours(drawn, real)
    assert found["precision"] > 0.95 > 0.5 > found["recall"]
    assert turned["recall"] > 0.95 > 0.5 > turned["precision"]


@pytest.mark.slow
def test_prdc_of_the_oracle():
    """Two sets of 10,000 × N(0, I_1000), k = 5: the mean of four draws. The oracle is one draw; over eight of ours,
    the numbers scatter by 0.012, 0.011, 0.06 and 0.006."""
    found = [ours(normal(2 * seed, 10_000, 1000), normal(2 * seed + 1, 10_000, 1000)) for seed in range(4)]
    mean = {name: np.mean([one[name] for one in found]) for name in found[0]}
    oracle = {"precision": 0.477, "recall": 0.471, "density": 1.056, "coverage": 0.974}
    for name, scatter in {"precision": 0.012, "recall": 0.011, "density": 0.06, "coverage": 0.006}.items():
        assert mean[name] == pytest.approx(oracle[name], abs=max(0.02, 2 * scatter))


# All of them, with intervals and refusals


def digit_features():
    with torch.no_grad():
        return classifier().features(torch.from_numpy(digits().images)).numpy()


def test_every_score_of_real_digits():
    features = digit_features()
    scores, refused = score(features[:900], reference(features), "digits", subset_size=400)
    assert refused == {}
    assert list(scores) == [
        "fd[digits]", "fd[digits]/real", "kid[digits]", "precision[digits]", "recall[digits]", "density[digits]",
        "coverage[digits]", "fd[digits]@64", "sure[digits]",
    ]  # fmt: skip
    assert {name: found.n for name, found in scores.items()} == dict.fromkeys(scores, 900) | {
        "fd[digits]@64": 64, "fd[digits]/real": 898
    }  # fmt: skip
    assert scores["fd[digits]"].value < scores["fd[digits]/real"].value < scores["fd[digits]@64"].value
    assert scores["sure[digits]"].value > 0.95
    assert scores["precision[digits]"].value == 1.0
    assert scores["fd[digits]"].over == "10 resamples"
    assert scores["kid[digits]"].over == "100 subsets of 400"
    assert "std" not in score(features[:900], reference(features), "digits", 400, intervals=False)[0][
        "fd[digits]"
    ].to_json()  # fmt: skip


def test_what_cannot_be_measured_is_refused_with_its_reason():
    features = digit_features()
    scores, refused = score(features[:5], reference(features), "digits", 256)
    assert set(refused) == {
        "kid[digits]", "precision[digits]", "recall[digits]", "density[digits]", "coverage[digits]"
    }  # fmt: skip
    assert "256 images and there are 5" in refused["kid[digits]"]
    assert "k = 5" in refused["recall[digits]"]
    assert scores["fd[digits]"].note == "biased: n is below the 64 dimensions"
    assert "at least two images" in score(features[:1], reference(features), "digits", 256)[1]["fd[digits]"]
    with pytest.raises(ValueError, match="have 3 dimensions, and the reference's 64"):
        score(features[:, :3], reference(features), "digits", 256)


def test_what_is_not_finite_gets_no_number():
    features = digit_features()[:100].copy()
    features[7, 3] = np.nan
    scores, refused = score(features, reference(digit_features()), "digits", 50)
    assert scores == {}
    assert {"fd[digits]", "kid[digits]", "precision[digits]", "coverage[digits]", "sure[digits]"} <= set(refused)
    assert set(refused.values()) == {"features of some images are not finite"}


def test_few_images_on_either_side_are_a_bias():
    features = digit_features()
    scores, refused = score(features[:500], reference(features[:30]), "digits", 20)
    assert scores["fd[digits]"].note == "biased: there are only 30 real images for 64 dimensions"
    assert scores["fd[digits]/real"].note == "15 real against the other 15; biased: n is below the 64 dimensions"
    few = reference(features[:6])
    four = Reference(features[:4], gaussian(features[:4]), torch.zeros(0), key=4)
    assert "recall[digits]" in score(features[:500], few, "digits", 4)[0]
    scores, refused = score(features[:500], four, "digits", 4)
    assert "k = 5 real images, not 4" in refused["recall[digits]"]
    assert {"fd[digits]", "kid[digits]"} <= set(scores)


def test_jackknife_of_a_mean_is_its_standard_error():
    x = normal(0, 1000)
    # Of a mean over ten equal groups, the delete-group jackknife is the groups' own standard error, exactly.
    assert jackknife(lambda chosen: {"mean": x[chosen].mean()}, 1000)["mean"] == pytest.approx(
        np.std(x.reshape(10, 100).mean(1), ddof=1) / 10**0.5
    )


def test_intervals_are_as_wide_as_fresh_samples_differ():
    features = digit_features()
    rng = np.random.default_rng(0)
    real = reference(features)
    found = [score(features[rng.permutation(1797)[:400]], real, "digits", 100)[0]["fd[digits]"] for _ in range(12)]
    ratio = np.mean([one.std for one in found]) / np.std([one.value for one in found])
    assert 0.5 < ratio < 2


# The digit classifier


def test_shipped_classifier_knows_digits_from_noise():
    assert WEIGHTS.stat().st_size < 300_000
    assert sum(p.numel() for p in DigitClassifier().parameters()) == 38_282
    data = digits()
    with torch.no_grad():
        accuracy = (classifier()(torch.from_numpy(data.images)).argmax(1).numpy() == data.labels).mean()
        noise = torch.randint(256, (512, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        of_noise = classifier().features(noise)
    assert accuracy > 0.98
    assert sure(torch.from_numpy(digit_features())).float().mean() > 0.95
    assert sure(of_noise).float().mean() < 0.02
    assert distance(of_noise.numpy(), digit_features()) > 400


def test_an_accuracy_is_of_each_images_own_prompt():
    data = digits()
    prompts = Sampling(400, "ddim", 2, 64, 0, tuple(prompt(label) for label in range(10))).prompts_of(0, 400)
    of = {label: iter(data.images[data.labels == label]) for label in range(10)}
    images = np.stack([next(of[index % 10]) for index in range(400)])
    network = networks.load("digits", None, torch.device("cpu"))
    features, real = (network(torch.from_numpy(one)).numpy() for one in (images, data.images))
    right = score(features, reference(real), "digits", 100, False, prompts)[0]["accuracy[digits]"]
    wrong = score(features, reference(real), "digits", 100, False, prompts[1:] + prompts[:1])[0]["accuracy[digits]"]
    assert right.value > 0.97 > 0.05 > wrong.value


# Copies of training images


def test_nearest_training_images():
    rng = np.random.default_rng(0)
    dataset = rng.integers(0, 256, (500, 3, 4, 4), np.uint8)
    trained = np.arange(100, 500)
    images = np.concatenate([dataset[250:252, :, :, ::-1], rng.integers(0, 256, (6, 3, 4, 4), np.uint8)])
    sides = [np.float64(images), np.float64(images[..., ::-1])]
    apart = np.stack([
        ((side[:, None] - np.float64(dataset[trained])) ** 2).mean((2, 3, 4)) ** 0.5 for side in sides
    ])  # fmt: skip
    index, found = nearest(images, dataset, trained, mirrored=False)
    np.testing.assert_array_equal(index, trained[apart[0].argmin(1)])
    np.testing.assert_allclose(found, apart[0].min(1), atol=0.1)
    index, found = nearest(images, dataset, trained, mirrored=True)
    np.testing.assert_array_equal(index, trained[apart.min(0).argmin(1)])
    assert list(index[:2]) == [250, 251]
    np.testing.assert_allclose(found, apart.min((0, 2)), atol=0.1)


def test_copies_are_told_from_new_images():
    images = digits().images
    trained, unseen, fresh = np.split(np.random.default_rng(0).permutation(1797), [1197, 1497])
    real = nearest(images[unseen], images, trained, mirrored=False)[1]
    share, threshold = copies(nearest(images[fresh], images, trained, mirrored=False)[1], real)
    assert share == pytest.approx(0.05, abs=0.04)
    assert threshold > 0
    copied = nearest(images[trained[:50]], images, trained, mirrored=False)[1]
    assert copies(copied, real)[0] == 1.0
    assert copies(copied, np.concatenate([real, np.zeros(100)]))[0] == 1.0  # where held-out images have twins

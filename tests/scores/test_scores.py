"""Scores against closed forms, float64 and independent implementations."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from runs import CHAOS
from scipy import stats
from sklearn.neighbors import NearestNeighbors

from fedray.data.sources import digits
from fedray.federation.sampling import Sampling
from fedray.scores import frechet, networks
from fedray.scores import prdc as prdc_module
from fedray.scores.cmmd import cmmd
from fedray.scores.digits import WEIGHTS, DigitClassifier, classifier, sure
from fedray.scores.frechet import Gaussian, extrapolated, frechet_distance, gaussian
from fedray.scores.kid import kernel_deviation, kernel_distance
from fedray.scores.nearest import copies, nearest
from fedray.scores.prdc import manifold, prdc
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


@pytest.mark.parametrize(("n", "d"), [(300, 24), (2000, 64)])
def test_the_distance_is_that_of_pytorch_fid_and_of_torch_fidelity(n, d):
    metric_fid = pytest.importorskip("torch_fidelity.metric_fid")
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = normal(0, n, d) @ normal(1, d, d), normal(2, n + 100, d) * 3 + 1
    statistics = [(each.mean(0), np.cov(each, rowvar=False)) for each in (x, y)]
    theirs = calculate_frechet_distance(*statistics[0], *statistics[1])
    assert distance(x, y) == pytest.approx(theirs, rel=3e-6)
    stats_of = [metric_fid.fid_features_to_statistics(torch.from_numpy(each)) for each in (x, y)]
    theirs = metric_fid.fid_statistics_to_metric(*stats_of, verbose=False)["frechet_inception_distance"]
    assert distance(x, y) == pytest.approx(theirs, rel=3e-6)


MEMORY = """
import sys
import numpy as np, torch
torch.set_num_threads(1)
from fedray.scores.frechet import frechet_distance, gaussian
features = np.memmap(sys.argv[1], np.float32, "r", shape=(50_000, int(sys.argv[3])))[:int(sys.argv[2])]
def private():
    pages = open("/proc/self/statm").read().split()
    return (int(pages[1]) - int(pages[2])) * 4096
peak, before, qr = 0, private(), torch.linalg.qr
def watched(*arguments, **named):
    global peak
    made = qr(*arguments, **named)
    peak = max(peak, private())
    return made
torch.linalg.qr = watched
print(frechet_distance(gaussian(features), gaussian(features[:10_000])), peak - before)
"""


@pytest.mark.slow
def test_fifty_thousand_features_take_no_more_memory_than_ten_thousand(tmp_path):
    """Each in a process of its own: the features are in a file, of which some thousand rows are read at a time."""
    d = 256
    file = np.memmap(tmp_path / "features", np.float32, "w+", shape=(50_000, d))
    for start in range(0, 50_000, 5000):
        file[start : start + 5000] = normal(start, 5000, d)
    file.flush()
    found, grown = zip(*(
        map(float, subprocess.run(
            [sys.executable, "-c", MEMORY, tmp_path / "features", str(n), str(d)], capture_output=True, text=True,
            check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is gone at once
        ).stdout.split()) for n in (10_000, 50_000)
    ), strict=True)  # fmt: skip
    x = np.asarray(file, np.float64)
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(eigenvalue_form(x, x[:10_000]), rel=1e-4)
    assert grown[1] - grown[0] < 0.2 * 40_000 * d * 8  # of what they would take in float64


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


def test_the_kernel_distances_deviation_is_that_of_fresh_draws():
    """The spread of subsets is three times as large, and was once given for it."""
    y, n, rng = normal(0, 900, 16), 400, torch.Generator().manual_seed(0)
    means, deviations, spreads = [], [], []
    for seed in range(1, 61):
        x = normal(seed, n, 16) * 1.1
        mean, spread = kernel_distance(x, y, 100, rng, 50)
        means.append(mean)
        spreads.append(spread)
        deviations.append((kernel_deviation(x, y, np.array_split(np.arange(n), 10)) ** 2 + spread**2 / 50) ** 0.5)
    assert 0.75 < np.mean(deviations) / np.std(means, ddof=1) < 1.33
    assert np.mean(spreads) / np.std(means, ddof=1) > 2


def test_the_kernel_distances_jackknife_is_its_definition():
    x, y = normal(0, 60, 5), normal(1, 70, 5)
    groups = np.array_split(np.arange(60), 10)

    def estimate(x):  # Gretton et al. 2012, equation 3, by loops' sums
        kernel = (x @ x.T / 5 + 1) ** 3
        off = ~np.eye(len(x), dtype=bool)
        return kernel[off].mean() - 2 * ((x @ y.T / 5 + 1) ** 3).mean()

    left = [estimate(np.delete(x, group, axis=0)) for group in groups]
    expected = (9 / 10 * ((left - np.mean(left)) ** 2).sum()) ** 0.5
    assert kernel_deviation(x, y, groups) == pytest.approx(expected, rel=1e-9)


# Extrapolated to infinitely many samples


def test_extrapolation_finds_the_distance_without_bias():
    """Two known Gaussians with diagonal covariances: ‖Δμ‖² + Σ (σ − τ)², and fewer samples give more."""
    d, n = 24, 1500
    scale = np.linspace(0.8, 1.2, d)
    truth = Gaussian(torch.zeros(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64))
    exact = d * 0.1**2 + ((scale - 1) ** 2).sum()
    finite, infinite = [], []
    for seed in range(20):
        x = normal(seed, n, d) * scale + 0.1
        finite.append(distance_to(truth, x))
        infinite.append(extrapolated(x, truth, torch.Generator().manual_seed(seed)))
    error = np.std(infinite, ddof=1) / 20**0.5
    assert np.mean(infinite) == pytest.approx(exact, abs=3 * error)
    assert np.mean(finite) > exact + 10 * np.std(finite) / 20**0.5  # the bias that it takes away


def test_extrapolation_is_the_intercept_of_a_line():
    x, y = normal(0, 200, 6), normal(1, 300, 6) * 1.2
    rng = torch.Generator().manual_seed(3)
    sizes = np.rint(np.linspace(20, 200, 15)).astype(int)
    measured = [eigenvalue_form(x[torch.randperm(200, generator=rng)[:size].numpy()], y) for size in sizes]
    expected = stats.linregress(1 / sizes, measured).intercept
    assert extrapolated(x, gaussian(y), torch.Generator().manual_seed(3)) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="at least 4 × 6 images"):
        extrapolated(x[:23], gaussian(y), rng)


def distance_to(truth, x):
    return frechet_distance(gaussian(x), truth)


# CMMD


def test_cmmd_is_the_formula_of_its_authors():
    """`distance.py` of the authors' code, in float64: all pairs, unit vectors, σ = 10, times 1000."""
    x, y = normal(0, 40, 8) + 1, normal(1, 50, 8)
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))

    def mean(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(2) / (2 * 10**2)).mean()

    expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
    assert cmmd(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-8)
    assert cmmd(torch.from_numpy(x), torch.from_numpy(x)) == pytest.approx(0, abs=1e-12)


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


def ours(real, drawn, left_out=()):
    return prdc(manifold(real.astype(np.float32)), torch.from_numpy(drawn.astype(np.float32)), left_out)


def test_prdc_equals_its_definition_and_is_not_swapped():
    # Half of what is real, and sharply: precise, of low recall.
    real, drawn = normal(0, 300, 4), normal(1, 200, 4) * 0.4
    (found,), (turned,) = ours(real, drawn), ours(drawn, real)
    assert found == pytest.approx(neighbours(real, drawn))
    assert found["precision"] > 0.95 > 0.5 > found["recall"]
    assert turned["recall"] > 0.95 > 0.5 > turned["precision"]


def test_prdc_without_a_group_is_that_of_the_others(monkeypatch):
    monkeypatch.setattr(prdc_module, "ROWS", 32)  # several blocks
    real, drawn = normal(0, 150, 4), normal(1, 100, 4) * 0.7
    groups = np.array_split(np.arange(100), 3)
    whole, *left = ours(real, drawn, groups)
    assert whole == pytest.approx(neighbours(real, drawn))
    for group, found in zip(groups, left, strict=True):
        assert found == pytest.approx(neighbours(real, np.delete(drawn, group, axis=0)))


@pytest.mark.slow
@pytest.mark.chaos
def test_prdc_of_the_oracle():
    """Two sets of 10,000 × N(0, I_1000), k = 5: the mean of two draws, in `make chaos` of four. The oracle is one draw;
    over eight of ours, the numbers scatter by 0.012, 0.011, 0.06 and 0.006."""
    seeds = range(4 if CHAOS else 2)
    found = [ours(normal(2 * seed, 10_000, 1000), normal(2 * seed + 1, 10_000, 1000))[0] for seed in seeds]
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
        "coverage[digits]", "fd[digits]@64", "fd[digits]@inf", "sure[digits]",
    ]  # fmt: skip
    assert {name: found.n for name, found in scores.items()} == dict.fromkeys(scores, 900) | {
        "fd[digits]@64": 64, "fd[digits]/real": 898
    }  # fmt: skip
    assert scores["fd[digits]"].value < scores["fd[digits]/real"].value < scores["fd[digits]@64"].value
    assert scores["sure[digits]"].value > 0.95
    assert scores["precision[digits]"].value == 1.0
    assert scores["fd[digits]"].over == "10 resamples"
    assert scores["kid[digits]"].over == "10 resamples"
    assert scores["kid[digits]"].note.startswith("100 subsets of 400, of which one has a standard deviation of ")
    plain = score(features[:900], reference(features), "digits", 400, intervals=False)[0]
    assert "fd[digits]@inf" not in plain
    assert all(plain[name].std is None for name in ("fd[digits]", "kid[digits]", "precision[digits]"))


def test_what_cannot_be_measured_is_refused_with_its_reason():
    features = digit_features()
    scores, refused = score(features[:5], reference(features), "digits", 256)
    assert set(refused) == {
        "kid[digits]", "precision[digits]", "recall[digits]", "density[digits]", "coverage[digits]", "fd[digits]@inf"
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
    left = [{"mean": np.delete(x, group).mean()} for group in np.array_split(np.arange(1000), 10)]
    # Of a mean over ten equal groups, the delete-group jackknife is the groups' own standard error, exactly.
    assert jackknife(left)["mean"] == pytest.approx(np.std(x.reshape(10, 100).mean(1), ddof=1) / 10**0.5)


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
    share, _, threshold, _ = copies(nearest(images[fresh], images, trained, mirrored=False)[1], real)
    assert share == pytest.approx(0.05, abs=0.04)
    assert threshold > 0
    copied = nearest(images[trained[:50]], images, trained, mirrored=False)[1]
    assert copies(copied, real)[0] == 1.0
    assert copies(copied, np.concatenate([real, np.zeros(100)]))[0] == 1.0  # where held-out images have twins


@pytest.mark.parametrize("m", [5, 20, 64, 256])
def test_copies_of_new_images_are_five_percent_with_the_deviation_that_is_said(m):
    """Under the null, generated and held-out images being of one kind; few held-out images make the threshold noisy."""
    rng = np.random.default_rng(m)
    found = [copies(rng.exponential(size=256), rng.exponential(size=m)) for _ in range(4000)]
    shares, deviations = np.array([one[:2] for one in found]).T
    expected = found[0][3]
    assert expected == max(0.05, 1 / (m + 1))
    assert shares.mean() == pytest.approx(expected, abs=4 * shares.std() / 4000**0.5)
    assert (deviations**2).mean() ** 0.5 == pytest.approx(shares.std(), rel=0.12 if m >= 20 else 0.25)

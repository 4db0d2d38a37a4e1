"""The scores of generated images: every number with the features it was measured on, its n, and its interval."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedray.scores.frechet import extrapolated, frechet_distance, gaussian
from fedray.scores.kid import SUBSETS, kernel_deviation, kernel_distance
from fedray.scores.metrics import Score
from fedray.scores.networks import network_of
from fedray.scores.prdc import prdc
from fedray.scores.reference import DRAWN, Reference
from fedray.seeds import generator

PAPERS = 64  # samples in the paper's FID (Chen 2024, section 3.1)
RESAMPLES = 10
SHARES = ("precision", "recall", "density", "coverage")


def score(
    features: np.ndarray,
    reference: Reference,
    name: str,
    subset_size: int,
    intervals: bool = True,
    prompts: Sequence[str] = (),
) -> tuple[dict[str, Score], dict[str, str]]:
    """Measure all scores of generated images against a reference; return also the reasons for those refused.

    fd (fid, on Inception's features): Fréchet distance;  fd@64: of the first 64 images, the paper's count;
    fd/real: real images against real ones, what a perfect model could be expected to get;  fd@inf: extrapolated to
    infinitely many images (with intervals only, since it takes fifteen distances);  kid: kernel distance;
    precision, recall, density, coverage;  sure[digits]: the share that the digit classifier is at least 0.9 sure of;
    accuracy[digits]: the share that it takes for the digit in their prompt;  clip-text, clip-image: mean cosine, in
    CLIP's space, of images and their prompts, and of images and all real ones;  cmmd: on CLIP's features.

    Memory is bounded if the features are memory-mapped: Fréchet and kernel distances read them in parts, in float64,
    and precision to coverage are of the first 10,000.

    Args:
        features: of the generated images, [n, d].
        name: of the feature network.
        prompts: what each image was generated for, if for anything.
        intervals: work out standard deviations over resamples (the jackknife over ten groups of images).
    """
    n, d = features.shape
    if d != reference.features.shape[1]:
        raise ValueError(f"the features have {d} dimensions, and the reference's {reference.features.shape[1]}")
    network, drawn = network_of(name), np.asarray(features, np.float32)
    fd, kid = network.score_name("fd"), network.score_name("kid")
    shares = {share: network.score_name(share) for share in SHARES}
    measured: list[tuple[Sequence[str], Callable[[], dict[str, Score]]]] = [
        ([fd], lambda: {fd: _frechet(drawn, reference, intervals)}),
        ([f"{fd}/real"], lambda: {f"{fd}/real": _floor(n, reference)}),
        ([kid], lambda: {kid: _kernel(drawn, reference, subset_size, intervals)}),
        ([*shares.values()], lambda: _shares(drawn[:DRAWN], reference, shares, intervals)),
    ]
    if n > PAPERS:
        few = f"{fd}@{PAPERS}"
        measured.append(([few], lambda: {few: _frechet(drawn[:PAPERS], reference, intervals)}))
    if intervals:
        measured.append(([f"{fd}@inf"], lambda: {f"{fd}@inf": _extrapolated(drawn, reference)}))
    if network.own:
        measured.append((network.own, lambda: network.own_scores(torch.from_numpy(drawn), reference, prompts)))
    scores: dict[str, Score] = {}
    refused: dict[str, str] = {}
    finite = bool(np.isfinite(drawn).all())
    for names, measure in measured:
        try:
            if not finite:
                raise ValueError("features of some images are not finite")
            scores |= measure()
        except ValueError as error:
            refused |= dict.fromkeys(names, str(error))
    return scores, refused


def _frechet(drawn: np.ndarray, reference: Reference, intervals: bool) -> Score:
    def distance(chosen: np.ndarray) -> dict[str, float]:
        return {"fd": frechet_distance(gaussian(drawn, chosen), reference.gaussian)}

    n = len(drawn)
    spread = _spread([distance(np.setdiff1d(np.arange(n), group)) for group in _groups(n, intervals)])
    note = _bias(n, len(reference.features), drawn.shape[1])
    return Score(distance(np.arange(n))["fd"], n, note=note, **spread.get("fd", {}))


def _floor(n: int, reference: Reference) -> Score:
    floor, count = reference.floor(n)
    against = len(reference.features) - count
    biased = _bias(count, against, reference.features.shape[1])
    return Score(floor, count, note=f"{count} real against the other {against}" + (f"; {biased}" if biased else ""))


def _bias(n: int, real: int, d: int) -> str | None:
    """Warn of a Fréchet distance of so few images that a covariance of d dimensions cannot be told."""
    if n < d:
        return f"biased: n is below the {d} dimensions"
    return f"biased: there are only {real} real images for {d} dimensions" if real < d else None


def _extrapolated(drawn: np.ndarray, reference: Reference) -> Score:
    value = extrapolated(drawn, reference.gaussian, generator(0, "extrapolation"))
    return Score(value, len(drawn), note="extrapolated in 1/n")


def _kernel(drawn: np.ndarray, reference: Reference, subset_size: int, intervals: bool) -> Score:
    """Score the kernel distance. Its deviation is over draws of the images, and of the subsets."""
    n = len(drawn)
    mean, spread = kernel_distance(drawn, reference.features, subset_size, generator(0, "kid"))
    note = f"{SUBSETS} subsets of {subset_size}, of which one has a standard deviation of {spread:.2g}"
    few = drawn[:DRAWN]
    if not (groups := _groups(len(few), intervals)):
        return Score(mean, n, note=note)
    of_images = kernel_deviation(few, reference.drawn.numpy(), groups) * (len(few) / n) ** 0.5
    return Score(mean, n, (of_images**2 + spread**2 / SUBSETS) ** 0.5, f"{RESAMPLES} resamples", note)


def _shares(drawn: np.ndarray, reference: Reference, names: dict[str, str], intervals: bool) -> dict[str, Score]:
    n = len(drawn)
    values, *left = prdc(reference.manifold, torch.from_numpy(drawn), _groups(n, intervals))
    spread, real = _spread(left), len(reference.features)
    note = f"against {DRAWN:,} of the {real:,} real images" if real > DRAWN else None
    return {names[share]: Score(value, n, note=note, **spread.get(share, {})) for share, value in values.items()}


def _groups(n: int, intervals: bool) -> list[np.ndarray]:
    """Divide n images into tenths, to leave out each once; nothing where they are too few, or not wanted."""
    return np.array_split(np.arange(n), RESAMPLES) if intervals and n >= 2 * RESAMPLES else []


def _spread(left: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Work out each score's standard deviation from scores without each tenth of the images, and say what over."""
    over = f"{RESAMPLES} resamples"
    return {name: {"std": std, "over": over} for name, std in jackknife(left).items()} if left else {}


def jackknife(left: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Estimate the standard deviation of statistics, from their values without each of g groups of samples.

    The delete-group jackknife, √((g − 1)/g Σ (θ_i − θ̄)²), Efron 1982. Unlike the bootstrap it draws no sample twice,
    of which a Fréchet distance would see too little variety.
    """
    return {name: float(np.std([values[name] for values in left])) * (len(left) - 1) ** 0.5 for name in left[0]}

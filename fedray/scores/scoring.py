"""The scores of generated images: every number with the features it was measured on, its n, and its interval."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fedray.scores.frechet import frechet_distance, gaussian
from fedray.scores.kid import SUBSETS, kernel_distance
from fedray.scores.metrics import Score
from fedray.scores.networks import network_of
from fedray.scores.prdc import distances, prdc
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
    fd/real: real images against real ones, what a perfect model could be expected to get;  kid: kernel distance;
    precision, recall, density, coverage;  sure[digits]: the share that the digit classifier is at least 0.9 sure of;
    accuracy[digits]: the share that it takes for the digit in their prompt;  clip-text, clip-image: mean cosine, in
    CLIP's space, of images and their prompts, and of images and all real ones.

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
        ([kid], lambda: {kid: _kernel(drawn, reference, subset_size)}),
        ([*shares.values()], lambda: _shares(drawn[:DRAWN], reference, shares, intervals)),
    ]
    if n > PAPERS:
        few = f"{fd}@{PAPERS}"
        measured.append(([few], lambda: {few: _frechet(drawn[:PAPERS], reference, intervals)}))
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
    spread = _spread(distance, n) if intervals else {}
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


def _kernel(drawn: np.ndarray, reference: Reference, subset_size: int) -> Score:
    mean, std = kernel_distance(drawn, reference.features, subset_size, generator(0, "kid"))
    return Score(mean, len(drawn), std, f"{SUBSETS} subsets of {subset_size}")


def _shares(drawn: np.ndarray, reference: Reference, names: dict[str, str], intervals: bool) -> dict[str, Score]:
    real, features = reference.manifold, torch.from_numpy(drawn)
    to_real, to_drawn = distances(real.features, features), distances(features, features)

    def shares(chosen: np.ndarray) -> dict[str, float]:
        return prdc(to_real[:, chosen], to_drawn[chosen][:, chosen], real.radii)

    n = len(drawn)
    values = shares(np.arange(n))
    spread = _spread(shares, n) if intervals else {}
    return {names[share]: Score(value, n, **spread.get(share, {})) for share, value in values.items()}


def _spread(statistic: Callable[[np.ndarray], dict[str, float]], n: int) -> dict[str, dict[str, Any]]:
    """Work out each score's standard deviation, and say what it is over; nothing for too few images."""
    if n < 2 * RESAMPLES:
        return {}
    deviations = jackknife(statistic, n)
    return {name: {"std": std, "over": f"{RESAMPLES} resamples"} for name, std in deviations.items()}


def jackknife(statistic: Callable[[np.ndarray], dict[str, float]], n: int) -> dict[str, float]:
    """Estimate the standard deviation of statistics of n samples, each tenth of them left out once.

    The delete-group jackknife, √((g − 1)/g Σ (θ_i − θ̄)²), Efron 1982. Unlike the bootstrap it draws no sample twice,
    of which a Fréchet distance would see too little variety.
    """
    groups = np.array_split(np.arange(n), RESAMPLES)
    drawn = [statistic(np.concatenate(groups[:left_out] + groups[left_out + 1 :])) for left_out in range(RESAMPLES)]
    factor = (RESAMPLES - 1) ** 0.5
    return {metric: float(np.std([values[metric] for values in drawn])) * factor for metric in drawn[0]}

"""How samples are judged: every number with the features it was measured on, its n, and its interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedray.scores import digits
from fedray.scores.frechet import frechet_distance, gaussian
from fedray.scores.kid import SUBSETS, kernel_distance
from fedray.scores.networks import CLIP, clip_texts, named
from fedray.scores.prdc import distances, prdc
from fedray.scores.reference import DRAWN, Reference
from fedray.seeds import generator

PAPERS = 64  # samples in the paper's FID (Chen 2024, section 3.1)
RESAMPLES = 10


@dataclass(frozen=True)
class Score:
    """A number, the count of drawn images it was measured on, its standard deviation and over what that was taken."""

    value: float
    n: int
    std: float | None = None
    over: str | None = None
    note: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


def score(
    features: np.ndarray,
    reference: Reference,
    name: str,
    subset_size: int,
    intervals: bool = True,
    prompts: Sequence[str] = (),
) -> tuple[dict[str, Score], dict[str, str]]:
    """All scores of drawn images' features [n, d] against a reference; and which were refused, with the reason.

    fd (fid, on Inception's features): Fréchet distance;  fd@64: of the first 64 images, the paper's count;
    fd/real: real images against real ones, what a perfect model could be expected to get;  kid: kernel distance;
    precision, recall, density, coverage;  sure[digits]: the share that the digit classifier is at least 0.9 sure of;
    accuracy[digits]: the share that it takes for the digit in their prompt;  clip-text, clip-image: mean cosine, in
    CLIP's space, of images and their prompts, and of images and all real ones (Ruiz et al. 2023, section 5.2).

    Args:
        name: of the feature network.
        prompts: what each image was drawn for, if for anything.
        intervals: work out standard deviations over resamples (the jackknife over ten groups of images).
    """
    n, d = features.shape
    scores: dict[str, Score] = {}
    refused: dict[str, str] = {}
    fd = named("fd", name)
    if d != reference.features.shape[1]:
        raise ValueError(f"the features have {d} dimensions, and the reference's {reference.features.shape[1]}")

    def spread(statistic: Callable[[np.ndarray], dict[str, float]], n: int) -> dict[str, dict[str, Any]]:
        if not intervals or n < 2 * RESAMPLES:
            return {}
        deviations = jackknife(statistic, n)
        return {metric: {"std": std, "over": f"{RESAMPLES} resamples"} for metric, std in deviations.items()}

    def frechet(metric: str, drawn: np.ndarray) -> None:
        def distance(chosen: np.ndarray) -> dict[str, float]:
            return {metric: frechet_distance(gaussian(drawn[chosen]), reference.gaussian)}

        biased = f"biased: n is below the {d} dimensions" if len(drawn) < d else None
        value = distance(np.arange(len(drawn)))[metric]
        scores[metric] = Score(value, len(drawn), note=biased, **spread(distance, len(drawn)).get(metric, {}))

    try:
        frechet(fd, features)
        floor, count = reference.floor(n)
        scores[f"{fd}/real"] = Score(
            floor, count, note=f"{count} real against the other {len(reference.features) - count}"
        )
        if n > PAPERS:
            frechet(f"{fd}@{PAPERS}", features[:PAPERS])
    except ValueError as error:
        refused[fd] = str(error)
    try:
        mean, std = kernel_distance(features, reference.features, subset_size, generator(0, "kid"))
        scores[named("kid", name)] = Score(mean, n, std, f"{SUBSETS} subsets of {subset_size}")
    except ValueError as error:
        refused[named("kid", name)] = str(error)
    try:
        drawn = torch.from_numpy(np.asarray(features[:DRAWN], np.float32))
        to_real, to_drawn = distances(reference.manifold.features, drawn), distances(drawn, drawn)

        def shares(chosen: np.ndarray) -> dict[str, float]:
            return prdc(to_real[:, chosen], to_drawn[chosen][:, chosen], reference.radii)

        spreads = spread(shares, len(drawn))
        for metric, value in shares(np.arange(len(drawn))).items():
            scores[named(metric, name)] = Score(value, len(drawn), **spreads.get(metric, {}))
    except ValueError as error:
        for metric in ("precision", "recall", "density", "coverage"):
            refused[named(metric, name)] = str(error)
    if name == "digits":
        of_digits = torch.from_numpy(np.asarray(features, np.float32))
        scores[named("sure", name)] = _share(digits.sure(of_digits))
        wanted = [digits.digit_in(prompt) for prompt in prompts]
        if wanted and None not in wanted:
            scores[named("accuracy", name)] = _share(digits.classes(of_digits) == torch.tensor(wanted))
    if name.startswith(CLIP):
        unit = F.normalize(torch.from_numpy(np.asarray(features, np.float32)))
        real = F.normalize(reference.manifold.features)
        scores["clip-image"] = Score((unit @ real.T).mean().item(), n)
        if prompts:
            different = list(dict.fromkeys(prompts))
            texts = F.normalize(clip_texts(name, different))[[different.index(prompt) for prompt in prompts]]
            alike = (unit * texts).sum(1)
            scores["clip-text"] = Score(alike.mean().item(), n, alike.std().item() / n**0.5, f"{n} images")
    return scores, refused


def _share(right: Tensor) -> Score:
    """How many of the images are right, bool [n], and the standard deviation of that share."""
    n, value = len(right), right.float().mean().item()
    return Score(value, n, (value * (1 - value) / n) ** 0.5, f"{n} images")


def jackknife(statistic: Callable[[np.ndarray], dict[str, float]], n: int) -> dict[str, float]:
    """Standard deviation of statistics of n samples: each tenth of them left out once (the delete-group jackknife).

    √((g − 1)/g Σ (θ_i − θ̄)²), Efron 1982. Unlike the bootstrap it draws no sample twice, of which a Fréchet
    distance would see too little variety.
    """
    groups = np.array_split(np.arange(n), RESAMPLES)
    drawn = [statistic(np.concatenate(groups[:left_out] + groups[left_out + 1 :])) for left_out in range(RESAMPLES)]
    factor = (RESAMPLES - 1) ** 0.5
    return {metric: float(np.std([values[metric] for values in drawn])) * factor for metric in drawn[0]}

"""The scores that fedray knows: one table, that says of each where it is better and whether it decides."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedray.lazy import torch


@dataclass(frozen=True)
class Score:
    """A number, the count of generated images it was measured on, and its standard deviation (and over what).

    draws: the values of several sets of n images, whose mean and standard deviation these are.
    """

    value: float
    n: int
    std: float | None = None
    over: str | None = None
    note: str | None = None
    draws: list[float] | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Metric:
    """A kind of score.

    name: how its scores' names begin (`fd[digits]`, `fd[digits]@64`), or a column of results;  rank: settings are
    compared by the lowest that was measured, by none without one;  title: what readers see in place of the name;
    remark: on its scale.
    """

    name: str
    higher_is_better: bool | None = None
    rank: int | None = None
    title: str | None = None
    remark: str | None = None


METRICS = {
    metric.name: metric
    for metric in (
        Metric("fid", higher_is_better=False, rank=1),
        Metric("fd", higher_is_better=False, rank=1),
        Metric("kid", higher_is_better=False, rank=2, remark="not times 1,000"),
        Metric("precision", higher_is_better=True),
        Metric("recall", higher_is_better=True),
        Metric("density", higher_is_better=True),
        Metric("coverage", higher_is_better=True),
        Metric("sure", higher_is_better=True),
        Metric("accuracy", higher_is_better=True),
        Metric("clip-text", higher_is_better=True),
        Metric("clip-image", higher_is_better=True),
        Metric("cmmd", higher_is_better=False, rank=2),
        Metric("copies"),  # of real images that were not trained on 5 % count as copies: it is no better to have fewer
        Metric("held_out.global", higher_is_better=False, rank=3, title="held-out loss"),
        Metric("loss", higher_is_better=False, rank=4, title="training loss"),
    )
}
LOSSES = {name: metric.title for name, metric in METRICS.items() if metric.title is not None}


def metric_of(score: str) -> Metric | None:
    """Find the metric of a score, by its name; None for a user's own.

    Reads names as runs record them: the features in brackets and the count of images are left out. "fd/real", real
    images against real ones, is no score of a model.
    """
    name = re.fullmatch(r"([^\[\]@/]+)(\[.*\])?(@(\d+|inf))?", score)
    return METRICS.get(name[1]) if name else None


def higher_is_better(score: str) -> bool:
    """Tell whether more of a score is better; of a user's own metric, less is."""
    metric = metric_of(score)
    return metric is not None and bool(metric.higher_is_better)


def deciding(scores: Iterable[str]) -> str | None:
    """Choose the score that settings are compared by: a Fréchet distance, else a kernel distance, else a loss."""
    ranks = {score: metric.rank for score in scores if (metric := metric_of(score)) and "@" not in score}
    ranked = {score: rank for score, rank in ranks.items() if rank is not None}
    return min(ranked, key=lambda score: ranked[score], default=None)


def over_draws(sets: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """Combine the scores of several sets of images from one model: means, and standard deviations over the sets."""
    if len(sets) == 1:
        return dict(sets[0])
    combined = {}
    for name in (name for name in sets[0] if all(name in scores for scores in sets)):
        if name.endswith("/real"):  # of no samples
            combined[name] = sets[0][name]
            continue
        first, draws = sets[0][name], [scores[name].value for scores in sets]
        mean = math.fsum(draws) / len(draws)
        std = (math.fsum((value - mean) ** 2 for value in draws) / (len(draws) - 1)) ** 0.5
        combined[name] = Score(mean, first.n, std, f"{len(draws)} draws", first.note, draws)
    return combined


def share(right: torch.Tensor) -> Score:
    """Score the share of images that are right, bool [n], with the standard deviation of that share."""
    n, value = len(right), right.float().mean().item()
    return Score(value, n, (value * (1 - value) / n) ** 0.5, f"{n} images")

"""Folds that a minority of malicious clients cannot move far. Apart from `NormBound`, they count clients alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from fedray.algorithms import Round, Upload, of_model
from fedray.algorithms.folds import Collect, Mean
from fedray.errors import RunError
from fedray.lazy import torch

CHUNK = 1 << 16  # coordinates at a time: beside the uploads, no more is in memory


class _Ordered(Collect):
    """A mean of each coordinate's middle values: of n values, all but the `trimmed(n)` smallest and largest."""

    def trimmed(self, n: int) -> int:
        raise NotImplementedError

    def combine(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        n, cut = len(tensors), self.trimmed(len(tensors))
        made = torch.empty(len(tensors[0]), dtype=torch.float64)
        for start in range(0, len(made), CHUNK):
            values = torch.stack([tensor[start : start + CHUNK] for tensor in tensors]).sort(0).values
            made[start : start + CHUNK] = values[cut : n - cut].double().mean(0)
        return made


@dataclass(frozen=True)
class Median(_Ordered):
    """The median of each coordinate, of an even number the mean of the two middle ones (Yin et al. 2018, option I)."""

    def trimmed(self, n: int) -> int:
        return (n - 1) // 2


@dataclass(frozen=True)
class Trimmed(_Ordered):
    """The mean of each coordinate without its ⌊β n⌋ smallest and largest values (Yin et al. 2018, option II)."""

    beta: float

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 0.5:
            raise ValueError("beta must be at least 0 and below 0.5")

    @property
    def least(self) -> int:
        return 1 if self.beta == 0 else math.ceil(1 / self.beta - 1e-9)  # with fewer it would trim nobody

    def trimmed(self, n: int) -> int:
        return math.floor(self.beta * n + 1e-9)


@dataclass(frozen=True)
class Krum(Collect):
    """The upload with the lowest score: Σ squared distances to its n − f − 2 nearest others (Blanchard et al. 2017).

    f: how many of a round may be malicious; n ≥ 2 f + 3. Distances are over all tensors at once, in float64; of equal
    scores, that of the client with the lower number is taken.
    """

    f: int

    @property
    def offers(self) -> frozenset[str]:
        return frozenset()  # distances are between whole uploads

    def __post_init__(self) -> None:
        if self.f < 0:
            raise ValueError("f must not be negative")

    @property
    def least(self) -> int:
        return 2 * self.f + 3

    def choose(self, uploads: list[Upload]) -> list[Upload]:
        return lowest_scores(uploads, self.f, 1)

    def combine(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return mean(tensors)


@dataclass(frozen=True)
class MultiKrum(Krum):
    """The mean of the m uploads with the lowest scores, m by default n − f (Blanchard et al. 2017)."""

    m: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m is not None and self.m < 1:
            raise ValueError("m must be above 0")

    @property
    def least(self) -> int:
        return max(2 * self.f + 3, self.f + (self.m or 0))

    def choose(self, uploads: list[Upload]) -> list[Upload]:
        return lowest_scores(uploads, self.f, self.m or len(uploads) - self.f)


@dataclass(frozen=True)
class NormBound(Mean):
    """The weighted mean of changes, those longer than `norm` shortened to it (Sun et al. 2019). It streams.

    A change is what a client made of the model that it received, after the wire; its length is the Euclidean norm.
    """

    norm: float

    differences = True

    def __post_init__(self) -> None:
        if not 0 < self.norm < math.inf:
            raise ValueError("the norm must be above 0")

    def add(self, partial: Any, upload: Upload, round: Round) -> Any:
        changes = {name: tensor for name, tensor in upload.tensors.items() if of_model(name)}
        length = math.hypot(*(torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in changes.values()))
        if length > self.norm:
            changes = {name: (x.double() * (self.norm / length)).float() for name, x in changes.items()}
        return super().add(partial, replace(upload, tensors=upload.tensors | changes), round)


def lowest_scores(uploads: list[Upload], f: int, m: int) -> list[Upload]:
    """Return the m of n uploads with the lowest sums of squared distances to their n − f − 2 nearest others.

    Raises:
        RunError: they do not all have the same tensors.
    """
    names = uploads[0].tensors.keys()
    for upload in uploads:
        if upload.tensors.keys() != names:
            raise RunError(f"clients {uploads[0].client} and {upload.client} send different tensors: no distance.")
    distances = torch.zeros(len(uploads), len(uploads), dtype=torch.float64)
    for name in names:
        for start in range(0, len(uploads[0].tensors[name]), CHUNK):
            part = torch.stack([upload.tensors[name][start : start + CHUNK] for upload in uploads]).double()
            # Not by products, which lose the small distances between honest uploads beside a large one.
            distances += torch.cdist(part, part, compute_mode="donot_use_mm_for_euclid_dist").square()
    nearest = distances.sort(1).values[:, 1 : len(uploads) - f - 1]  # the first is its own
    best = nearest.sum(1).sort(stable=True).indices[:m]
    return [uploads[index] for index in sorted(best.tolist())]


def mean(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the unweighted mean [d], float64."""
    total = torch.zeros(len(tensors[0]), dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return total / len(tensors)

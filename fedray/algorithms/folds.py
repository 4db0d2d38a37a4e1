"""Folds combine the uploads of a round. A fold is a monoid: uploads are added to a partial, partials are merged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedray.algorithms import Folded, Round, Rows, Tensors, Upload
from fedray.lazy import torch


class Fold:
    """A way to combine the uploads of a round. Derive from it, as a frozen dataclass."""

    abstract = False  # not to be named by users

    @property
    def needs(self) -> Mapping[str, str]:
        """Requirements on the rest of a run: by name, the message for users where it is not met."""
        return {}

    @property
    def offers(self) -> frozenset[str]:
        """Properties that others may require: "uploads" where it keeps them."""
        return frozenset()

    def start(self, round: Round) -> Any:
        """Return the partial of no upload."""
        raise NotImplementedError

    def add(self, partial: Any, upload: Upload, round: Round) -> Any:
        """Return the partial with one more upload; `partial` may be changed."""
        raise NotImplementedError

    def merge(self, first: Any, second: Any, round: Round) -> Any:
        """Return the partial of the uploads of both; both may be changed."""
        raise NotImplementedError

    def result(self, partial: Any, round: Round) -> Folded:
        """Return the combination of all uploads."""
        raise NotImplementedError


class Collect(Fold):
    """A fold that collects all uploads and combines them at once: its memory grows with the cohort."""

    abstract = True

    def start(self, round: Round) -> list[Upload]:
        return []

    def add(self, partial: list[Upload], upload: Upload, round: Round) -> list[Upload]:
        return [*partial, upload]

    def merge(self, first: list[Upload], second: list[Upload], round: Round) -> list[Upload]:
        return first + second

    def result(self, partial: list[Upload], round: Round) -> Folded:
        uploads = sorted(partial, key=lambda upload: upload.client)
        sums: Tensors = {}
        weights: dict[str, float] = {}
        for name in dict.fromkeys(name for upload in uploads for name in upload.tensors):
            sent = [upload for upload in uploads if name in upload.tensors]
            weights[name] = sum(upload.weights[name] for upload in sent)
            sums[name] = self.combine([upload.tensors[name] for upload in sent]).double() * weights[name]
        return Folded(sums, weights, [(upload.client, upload.rows) for upload in uploads], uploads)

    def combine(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return the replacement for the mean, from each client's tensor [d], ascending by client."""
        raise NotImplementedError


@dataclass
class _Means:
    """A partial of `Mean`: running means and their weights by name, numbers by client, and uploads if they are kept."""

    means: Tensors = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[int, Rows]] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)


@dataclass(frozen=True)
class Mean(Fold):
    """The weighted mean Σ w x / Σ w, as a running mean: it holds one upload at a time; of a single one it is x itself.

    Adapters' uploads are kept: products of factors are no sums of vectors.
    """

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"uploads"})

    def start(self, round: Round) -> _Means:
        return _Means()

    def add(self, partial: _Means, upload: Upload, round: Round) -> _Means:
        for name, tensor in upload.tensors.items():
            self._add(partial, name, tensor, upload.weights[name])
        partial.rows.append((upload.client, upload.rows))
        if round.adapters is not None:
            partial.uploads.append(upload)
        return partial

    def _add(self, partial: _Means, name: str, tensor: torch.Tensor, weight: int) -> None:
        if weight == 0:
            return
        partial.weights[name] = total = partial.weights.get(name, 0) + weight
        if name not in partial.means:
            partial.means[name] = tensor.clone()
        else:
            partial.means[name].lerp_(tensor, weight / total)

    def merge(self, first: _Means, second: _Means, round: Round) -> _Means:
        for name, mean in second.means.items():
            self._add(first, name, mean, second.weights[name])
        return _Means(first.means, first.weights, first.rows + second.rows, first.uploads + second.uploads)

    def result(self, partial: _Means, round: Round) -> Folded:
        sums = {name: mean.double() * partial.weights[name] for name, mean in partial.means.items()}
        uploads = sorted(partial.uploads, key=lambda upload: upload.client)
        weights: dict[str, float] = {**partial.weights}
        return Folded(sums, weights, sorted(partial.rows, key=lambda row: row[0]), uploads)

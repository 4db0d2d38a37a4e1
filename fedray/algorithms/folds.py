"""Folds combine the uploads of a round. A fold is a monoid: uploads are added to a partial, partials are merged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedray.algorithms import Folded, Round, Rows, Tensors, Upload
from fedray.errors import RunError
from fedray.lazy import torch
from fedray.vector.integers import add_term, first_term, to_floats


class Fold:
    """A way to combine the uploads of a round. Derive from it, as a frozen dataclass.

    It is a monoid: clients are added to partials, in any order and grouping, and partials are merged, in any tree.
    """

    abstract = False  # not to be named by users
    bound: float = math.inf  # values must be smaller; a client that sends others (or NaN) has failed
    uniform = False  # clients must count alike, whatever the number of their examples
    differences = False  # uploads are changes from what clients received, also where the wire is exact

    @property
    def least(self) -> int:
        """The number of uploads that it needs; a round with fewer ends the run."""
        return 1

    def needed(self, cohort: int) -> int:
        """Return how many of a cohort of so many would do."""
        return self.least

    def memory(self, round: Round) -> int:
        """Return the bytes of uploads that the driver holds at the end of a round in which all take part."""
        return 0

    @property
    def needs(self) -> Mapping[str, str]:
        """Requirements on the rest of a run: by name, the message for users where it is not met."""
        return {}

    @property
    def offers(self) -> frozenset[str]:
        """Properties that others may require.

        "sums" where it adds up, "uploads" where it keeps them beside, "parts of uploads" where clients may send other
        tensors than others do.
        """
        return frozenset()

    def step(self, round: Round) -> float:
        """Return the unit to which it rounds each value, 0 where rounding is below 2^−20 of what matters."""
        return 0.0

    @property
    def most(self) -> float:
        """How many clients of a round it can combine."""
        return math.inf

    def exchanged(self, round: Round) -> tuple[int, int]:
        """Return the bytes that each client receives and sends in a round beside its payloads."""
        return 0, 0

    def seal(self, payload: dict[str, np.ndarray], round: Round, client: int) -> dict[str, np.ndarray]:
        """Return a client's message as it leaves the client: the client's half, for what the server must not see."""
        return payload

    def start(self, round: Round) -> Any:
        """Return the partial of no upload."""
        raise NotImplementedError

    def add(self, partial: Any, upload: Upload, round: Round) -> Any:
        """Return the partial with one more upload; `partial` may be changed.

        The upload's tensors are memory that the next client is trained in: keep copies (`copied`).
        """
        raise NotImplementedError

    def merge(self, first: Any, second: Any, round: Round) -> Any:
        """Return the partial of the uploads of both; `first` may be changed, and the tensors of `second` may not."""
        raise NotImplementedError

    def result(self, partial: Any, round: Round) -> Folded:
        """Return the combination of all uploads. It may use the partial up."""
        raise NotImplementedError


class Collect(Fold):
    """A fold that collects all uploads and combines them at once: its memory grows with the cohort."""

    abstract = True

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"parts of uploads"})

    def memory(self, round: Round) -> int:
        return 4 * round.layout.size * len(round.cohort)

    def start(self, round: Round) -> list[Upload]:
        return []

    def add(self, partial: list[Upload], upload: Upload, round: Round) -> list[Upload]:
        return [*partial, copied(upload)]

    def merge(self, first: list[Upload], second: list[Upload], round: Round) -> list[Upload]:
        return first + list(map(copied, second))  # Ray's object store holds less than the driver

    def result(self, partial: list[Upload], round: Round) -> Folded:
        uploads = sorted(partial, key=lambda upload: upload.client)
        if len(uploads) < self.least:
            raise RunError(f"there are {len(uploads)} uploads, and this fold needs {self.least}.")
        chosen = self.choose(uploads)
        sums: Tensors = {}
        weights: dict[str, float] = {}
        for name in dict.fromkeys(name for upload in chosen for name in upload.tensors):
            weights[name] = sum(upload.weights[name] for upload in uploads if name in upload.tensors)
            sent = [upload.tensors[name] for upload in chosen if name in upload.tensors]
            sums[name] = self.combine(sent).double() * weights[name]
        return Folded(sums, weights, [(upload.client, upload.rows) for upload in uploads], uploads)

    def choose(self, uploads: list[Upload]) -> list[Upload]:
        """Return the uploads that are combined, of all, ascending by client; by default all."""
        return uploads

    def combine(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Return the replacement for the mean, from each client's tensor [d], ascending by client."""
        raise NotImplementedError


def copied(upload: Upload) -> Upload:
    """Return an upload with tensors of its own."""
    return replace(upload, tensors={name: tensor.clone() for name, tensor in upload.tensors.items()})


@dataclass
class _Sums:
    """A partial of `Mean`: one upload as it is, or sums of integers; weights by name, and numbers by client."""

    alone: Upload | None = None
    sums: dict[str, np.ndarray] = field(default_factory=dict)  # int64, in units of 2^−k
    weights: dict[str, int] = field(default_factory=dict)
    rows: list[tuple[int, Rows]] = field(default_factory=list)
    uploads: list[Upload] = field(default_factory=list)  # of adapters


@dataclass(frozen=True)
class Mean(Fold):
    """The weighted mean Σ w x / Σ w, exactly the same for any order, grouping and tree; of a single upload x itself.

    Σ rint(w x 2^k) is a sum of integers. k is the largest for which the planned cohort stays below 2^62, whoever takes
    part: of weights that sum up to 1,000, every term is rounded at 2^−42 (of the mean, 2^−52). Adapters' uploads are
    kept: products of factors are no sums of vectors.
    """

    bound = 2.0**10

    @property
    def offers(self) -> frozenset[str]:
        return frozenset({"sums", "uploads", "parts of uploads"})

    def memory(self, round: Round) -> int:
        return 0 if round.adapters is None else 4 * round.layout.size * len(round.cohort)

    def start(self, round: Round) -> _Sums:
        return _Sums()

    def add(self, partial: _Sums, upload: Upload, round: Round) -> _Sums:
        first = not partial.rows
        _check_sizes(_sizes(partial), {name: len(tensor) for name, tensor in upload.tensors.items()})
        if first or round.adapters is not None:
            upload = copied(upload)
        if first:
            partial.alone = upload
        else:
            _spill(partial, round)
            _add_terms(partial.sums, upload, round)
        for name in upload.tensors:
            partial.weights[name] = partial.weights.get(name, 0) + upload.weights[name]
        partial.rows.append((upload.client, upload.rows))
        if round.adapters is not None:
            partial.uploads.append(upload)
        return partial

    def merge(self, first: _Sums, second: _Sums, round: Round) -> _Sums:
        _check_sizes(_sizes(first), _sizes(second))
        if not first.rows and second.alone is not None:
            first.alone = second.alone
        elif second.rows:
            _spill(first, round)
            if second.alone is not None:
                _add_terms(first.sums, second.alone, round)
            for name, total in second.sums.items():
                if name in first.sums:
                    first.sums[name] += total
                else:
                    first.sums[name] = total.copy()
        for name, weight in second.weights.items():
            first.weights[name] = first.weights.get(name, 0) + weight
        first.rows += second.rows
        first.uploads += second.uploads
        return first

    def result(self, partial: _Sums, round: Round) -> Folded:
        sums: Tensors = {}
        weights: dict[str, float] = {name: weight for name, weight in partial.weights.items() if weight}
        for name in weights:
            if partial.alone is not None:
                sums[name] = partial.alone.tensors[name].double() * weights[name]
            else:
                sums[name] = torch.from_numpy(to_floats(partial.sums.pop(name), 2.0 ** -_shift(name, round)))
        uploads = sorted(partial.uploads, key=lambda upload: upload.client)
        return Folded(sums, weights, sorted(partial.rows, key=lambda row: row[0]), uploads)


def _sizes(partial: _Sums) -> dict[str, int]:
    held = partial.alone.tensors if partial.alone is not None else partial.sums
    return {name: len(tensor) for name, tensor in held.items()}


def _check_sizes(held: Mapping[str, int], more: Mapping[str, int]) -> None:
    """Raise `RunError` for tensors that cannot be added up, before any is."""
    for name in held.keys() & more.keys():
        if held[name] != more[name]:
            raise RunError(
                f"clients send tensors {name!r} of {held[name]:,} and of {more[name]:,} elements; an algorithm must "
                f"send the same sizes for all."
            )


def _shift(name: str, round: Round) -> int:
    """Return k, of units of 2^−k in which tensors of that name are added up."""
    return 62 - 10 - (round.total(name) - 1).bit_length()


def _add_terms(sums: dict[str, np.ndarray], upload: Upload, round: Round) -> None:
    for name, tensor in upload.tensors.items():
        if weight := upload.weights[name]:
            scale = weight * 2.0 ** _shift(name, round)
            if name in sums:
                add_term(sums[name], tensor.numpy(), scale)
            else:
                sums[name] = first_term(tensor.numpy(), scale)


def _spill(partial: _Sums, round: Round) -> None:
    """Make a single upload the first term of sums."""
    if partial.alone is not None:
        _add_terms(partial.sums, partial.alone, round)
        partial.alone = None

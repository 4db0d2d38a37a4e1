"""The link that sends the largest values."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedray.algorithms import Round, Tensors
from fedray.lazy import torch
from fedray.wire import VALUES, Link


@dataclass(frozen=True)
class TopK(Link):
    """The ⌊share · d⌋ values of largest magnitude, at least one, and their indices as int32; on the way up.

    Of equal magnitudes, those of lower indices are sent. The rest is lost: put `feedback` around it (Stich et al.
    2018). A last number says how long the vector is.
    """

    share: float

    lossy = True
    sparse = True
    contracts = True

    def __post_init__(self) -> None:
        check_share(self.share)

    def encode(self, x: torch.Tensor, memory: Tensors, round: Round, client: int) -> tuple[Tensors, Tensors]:
        indices = largest(x, count(self.share, len(x)))
        return {VALUES: x[indices], "indices": indices.int(), "size": torch.tensor([len(x)], dtype=torch.int32)}, {}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        assert isinstance(payload, dict)
        x = torch.zeros(int(payload["size"]))
        x[payload["indices"].long()] = payload[VALUES].float()
        return x


def largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """Return the indices, ascending, of the first k in the order of (−|x|, index)."""
    magnitude = x.abs()
    least = magnitude.topk(k, sorted=False).values.min()
    chosen = magnitude > least
    ties = (magnitude == least).nonzero()[:, 0]
    chosen[ties[: k - int(chosen.sum())]] = True
    return chosen.nonzero()[:, 0]


def count(share: float, size: int) -> int:
    """Return how many of so many values are sent."""
    return max(1, math.floor(share * size + 1e-9))


def check_share(share: float) -> None:
    """Raise `ValueError` unless it is a share."""
    if not 0 < share <= 1:
        raise ValueError("the share must be above 0 and at most 1")

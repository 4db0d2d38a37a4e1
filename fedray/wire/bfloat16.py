"""The link that halves the bytes and keeps float32's range."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Round, Tensors
from fedray.lazy import torch
from fedray.wire import Link


@dataclass(frozen=True)
class BFloat16(Link):
    """Half the bytes, in both directions: the upper 16 bits of float32, to which values are rounded (to even at ties).

    A value is off by at most 2^−8 of itself. As with `Float16`, the server adds the mean of differences to its own w.
    """

    lossy = True
    coded = True  # NumPy has no such type: the bits travel as int16

    def send(self, x: torch.Tensor, round: Round) -> torch.Tensor:
        return _bits(x)

    def arrive(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        return self.decode(payload, round)

    def encode(self, x: torch.Tensor, memory: Tensors, round: Round, client: int) -> tuple[torch.Tensor, Tensors]:
        return _bits(x), {}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        assert isinstance(payload, torch.Tensor)
        return payload.view(torch.bfloat16).float()


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.bfloat16).view(torch.int16)

"""The link that halves the bytes."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Round, Tensors
from fedray.lazy import torch
from fedray.wire import Link


@dataclass(frozen=True)
class Float16(Link):
    """Half the bytes: fp16(w) goes down and fp16(v − fp16(w)) up; the server adds the mean to its float32 w.

    Differences, because rounding the weights themselves to float16 would freeze most of them.

    Raises:
        OverflowError: a value is beyond float16's largest, 65,504.
    """

    lossy = True

    def send(self, x: torch.Tensor, round: Round) -> torch.Tensor:
        return _half(x, "model")

    def arrive(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        assert isinstance(payload, torch.Tensor)
        return payload.float()

    def encode(self, x: torch.Tensor, memory: Tensors, round: Round, client: int) -> tuple[torch.Tensor, Tensors]:
        return _half(x, "update"), {}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        assert isinstance(payload, torch.Tensor)
        return payload.float()


def _half(values: torch.Tensor, what: str) -> torch.Tensor:
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise OverflowError(f"the {what} has values beyond float16's range; use wire float32.")
    return half

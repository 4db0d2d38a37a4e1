"""Error feedback around a lossy link."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedray.algorithms import Round, Tensors
from fedray.lazy import torch
from fedray.wire import Link


@dataclass(frozen=True)
class Feedback(Link):
    """Each client remembers what a link did not send of x, and adds it to x the next time; on the way up.

    sent = decode(encode(x + residual)), residual ← x + residual − sent (Seide et al. 2014; Karimireddy et al. 2019,
    algorithm 2). The memory, a vector a client, is that of the last round which the client completed.
    """

    link: Link

    lossy = True
    remembers = True

    def __post_init__(self) -> None:
        if self.link.diverges:
            raise ValueError("what it sends may be longer than the vector, so errors would grow (unbiased=false?)")
        if self.link.remembers:
            raise ValueError("this link remembers by itself what it does not send")

    @property
    def tensors(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.link.tensors

    @property
    def uniform(self) -> bool:  # type: ignore[override]
        return self.link.uniform

    @property
    def coded(self) -> bool:  # type: ignore[override]
        return self.link.coded

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        return self.link.sparse

    @property
    def needs(self) -> Mapping[str, str]:
        why = "remembers factors that this algorithm replaces every round: leave feedback out"
        parts = (
            "remembers what it did not send, and this algorithm sends other tensors the next time: leave feedback out"
        )
        return {**self.link.needs, "fixed coordinates": why, "same upload": parts}

    @property
    def offers(self) -> frozenset[str]:
        return self.link.offers

    def encode(
        self, x: torch.Tensor, memory: Tensors, round: Round, client: int
    ) -> tuple[torch.Tensor | Tensors, Tensors]:
        own = dict(memory)
        x = x + own.pop("residual") if own else x
        made, kept = self.link.encode(x, own, round, client)
        return made, {**kept, "residual": x - self.link.decode(made, round)}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        return self.link.decode(payload, round)

    def finish(
        self, total: torch.Tensor, weight: float, round: Round, survivors: list[int]
    ) -> tuple[torch.Tensor, float]:
        return self.link.finish(total, weight, round, survivors)

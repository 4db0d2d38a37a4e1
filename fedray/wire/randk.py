"""The link that sends values drawn at random."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Round, Tensors
from fedray.lazy import torch
from fedray.seeds import number
from fedray.wire import VALUES, Link
from fedray.wire.topk import check_share, count


@dataclass(frozen=True)
class RandK(Link):
    """⌊share · d⌋ values, at least one, that are drawn anew for each client and round; on the way up.

    Indices do not travel: both sides draw them from a seed, which is sent with the vector's length as two int64
    (Konečný et al. 2016). Values are divided by the share that is sent, which makes them unbiased; with
    unbiased=false they are not, as `feedback` needs them.
    """

    share: float
    unbiased: bool = True

    lossy = True
    sparse = True

    def __post_init__(self) -> None:
        check_share(self.share)

    @property
    def diverges(self) -> bool:  # type: ignore[override]
        return self.unbiased

    def encode(self, x: torch.Tensor, memory: Tensors, round: Round, client: int) -> tuple[Tensors, Tensors]:
        drawn = torch.tensor([number(round.seed, "randk", client, round.number), len(x)])
        values = x[self._indices(drawn)]
        return {VALUES: values * (len(x) / len(values)) if self.unbiased else values, "drawn": drawn}, {}

    def decode(self, payload: torch.Tensor | Tensors, round: Round) -> torch.Tensor:
        assert isinstance(payload, dict)
        x = torch.zeros(int(payload["drawn"][1]))
        x[self._indices(payload["drawn"])] = payload[VALUES].float()
        return x

    def _indices(self, drawn: torch.Tensor) -> torch.Tensor:
        seed, size = drawn.tolist()
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        return order[: count(self.share, size)]

"""A client sends the largest changes, and remembers the rest for the next round (Stich et al. 2018, algorithm 1)."""

from dataclasses import dataclass

import torch

from fedray import Link


@dataclass(frozen=True)
class Sparse(Link):
    share: float

    lossy = True

    def encode(self, x, memory, round, client):
        whole = x + memory.get("residual", 0)
        kept = torch.sort(whole.abs(), descending=True, stable=True).indices[: max(1, int(self.share * len(x)))]
        residual = whole.clone()
        residual[kept] = 0
        return {"values": whole[kept], "indices": kept.int()}, {"residual": residual}

    def decode(self, payload, round):
        x = torch.zeros(round.layout.size)
        x[payload["indices"].long()] = payload["values"].float()
        return x

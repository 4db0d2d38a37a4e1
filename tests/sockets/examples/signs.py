"""A client sends a bit for each change, and remembers what that leaves out (Karimireddy et al. 2019, EF-SignSGD)."""

from dataclasses import dataclass

import numpy as np
import torch

from fedray import Link


@dataclass(frozen=True)
class Signs(Link):
    lossy = coded = True

    def encode(self, x, memory, round, client):
        whole = x + memory.get("residual", 0)
        scale = whole.abs().mean()
        residual = whole - scale * torch.where(whole >= 0, 1, -1)
        bits = torch.from_numpy(np.packbits(whole.numpy() >= 0))
        return {"values": bits, "scale": scale.reshape(1)}, {"residual": residual}

    def decode(self, payload, round):
        bits = np.unpackbits(payload["values"].numpy(), count=round.layout.size)
        return payload["scale"] * (2.0 * torch.from_numpy(bits) - 1)

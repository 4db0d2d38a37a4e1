"""Clients whose losses are bent so that all end in the same place (Acar et al. 2021, FedDyn, algorithm 1)."""

from dataclasses import dataclass

import torch

from fedray import Algorithm


@dataclass(frozen=True)
class FedDyn(Algorithm):
    alpha: float = 0.1

    def init(self, model, layout):
        return {"model": model, "h": torch.zeros_like(model)}

    def correct(self, gradient, weights, down, memory):
        gradient.add_(weights - down["model"], alpha=self.alpha)
        if "gradient" in memory:
            gradient.sub_(memory["gradient"])

    def upload(self, local, down, memory):
        moved = local.weights - down["model"]
        gradient = memory.get("gradient", torch.zeros_like(moved)) - self.alpha * moved
        return {"model": local.weights, "moved": moved}, {}, {"gradient": gradient}

    def aggregate(self, server, folded, round):
        h = server["h"] - self.alpha * (folded.sums["moved"] / round.clients).float()
        return {"model": folded.mean("model") - h / self.alpha, "h": h}

"""A server that steps along a moving average of the clients' changes (Hsu, Qi and Brown 2019, FedAvgM)."""

from dataclasses import dataclass

import torch

from fedray import Algorithm


@dataclass(frozen=True)
class Momentum(Algorithm):
    beta: float = 0.9

    def init(self, model, layout):
        return {"model": model, "velocity": torch.zeros_like(model)}

    def aggregate(self, server, folded, round):
        change = folded.mean("model") - server["model"]
        velocity = self.beta * server["velocity"] + change
        return {"model": server["model"] + velocity, "velocity": velocity}

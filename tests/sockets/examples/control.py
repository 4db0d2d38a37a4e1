"""Clients that remember how their gradients differ from the others' (Karimireddy et al. 2020, SCAFFOLD, option II)."""

from dataclasses import dataclass

import torch

from fedray import Algorithm


@dataclass(frozen=True)
class Scaffold(Algorithm):
    def init(self, model, layout):
        return {"model": model, "control": torch.zeros_like(model)}

    def broadcast(self, server, round):
        return server

    def correct(self, gradient, weights, down, memory):
        gradient.add_(down["control"]).sub_(memory.get("control", torch.zeros_like(gradient)))

    def upload(self, local, down, memory):
        before = memory.get("control", torch.zeros_like(local.weights))
        after = before - down["control"] + (down["model"] - local.weights) / local.total_learning_rate
        return {"model": local.weights, "control": after - before}, {}, {"control": after}

    def aggregate(self, server, folded, round):
        control = server["control"] + (folded.sums["control"] / round.clients).float()
        return {"model": folded.mean("model"), "control": control}

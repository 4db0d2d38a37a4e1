"""Clients that correct their gradients for how these differ from the others' (Karimireddy et al. 2020, SCAFFOLD)."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Local, Round, Rows, Tensors
from fedray.lazy import torch
from fedray.vector import Layout


@dataclass(frozen=True)
class Scaffold(Algorithm):
    """A client steps y ← y − η (g(y) − c_i + c); the server keeps c ← c + (1/N) Σ (c_i⁺ − c_i), the mean of all c_i.

    arXiv:1910.06378, algorithm 1, with a global step size of 1. By option 1, c_i⁺ is the gradient at x, the server's
    model, over all of the client's examples, at the price of a pass over them; by option 2 it is
    c_i − c + (x − y) / (K η), the mean of the gradients of its K steps. Gradients are clipped after they are
    corrected: where clipping is active, c_i⁺ of option 2 is no mean of gradients (max_grad_norm None never clips).
    """

    option: int = 2

    def __post_init__(self) -> None:
        if self.option not in (1, 2):
            raise ValueError(f"option is {self.option}; it must be 1 or 2")

    @property
    def needs(self) -> dict[str, str]:
        return {"plain sgd": "corrects steps of plain SGD, of which alone the paper is: use --optimizer sgd"}

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        return {"model": model, "control": torch.zeros_like(model)}

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        return {"model": server["model"], "control": server["control"]}

    def correct(self, gradient: torch.Tensor, weights: torch.Tensor, down: Tensors, memory: Tensors) -> None:
        gradient.add_(down["control"])
        if "control" in memory:
            gradient.sub_(memory["control"])

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        if self.option == 1:
            memory["gradient"] = local.gradient()
        super().train(local, down, memory)

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        own = memory.get("control", torch.zeros_like(local.weights))
        if self.option == 1:
            control = memory["gradient"]
        else:
            reach = local.total_learning_rate or 1.0  # a schedule may begin at 0: then nothing has moved
            control = own - down["control"] + (down["model"] - local.weights) / reach
        return {"model": local.weights, "control": control - own}, {}, {"control": control}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        control = server["control"] + (folded.sums["control"] / round.clients).float()
        return server | {"model": folded.mean("model"), "control": control}

"""A personal model beside the global one."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.algorithms import Algorithm, Local, Rows, Tensors, Wrapper
from fedray.algorithms.fedavg import FedAvg
from fedray.lazy import torch


@dataclass(frozen=True)
class Ditto(Wrapper):
    """Each client also trains a model v of its own, pulled to the received w: v ← v − η (∇F(v) + λ (v − w)).

    Li et al. 2021 (arXiv:2012.04221, algorithm 1), around any method for w. v begins as w, never travels, makes as many
    steps as w on the same batches, and gets a fresh optimizer every round. So training takes twice the time.
    """

    lam: float
    algorithm: Algorithm = FedAvg()

    @property
    def needs(self) -> dict[str, str]:
        whole = "keeps a whole model of each client's own: leave --share and --keep-local out"
        fixed = "keeps models of clients' own, which do not fit new factors: use another method for the global one"
        return {**self.algorithm.needs, "whole vector": whole, "fixed coordinates": fixed}

    @property
    def offers(self) -> frozenset[str]:
        return self.algorithm.offers | {"personal"}

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        self.algorithm.train(local, down, memory)

        def pull(gradient: torch.Tensor, own: torch.Tensor) -> None:
            gradient.add_(own - down["model"], alpha=self.lam)

        start = memory.get("ditto/model", down["model"])
        memory["ditto/model"], memory["ditto/loss"] = local.apart(start, pull)

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        own, loss = memory.pop("ditto/model", None), memory.pop("ditto/loss", None)
        tensors, rows, kept = self.algorithm.upload(local, down, memory)
        if own is None or loss is None:  # it has not trained
            return tensors, rows, kept
        return tensors, rows | {"personal_loss": loss.item()}, kept | {"ditto/model": own}

    def personal(self, model: torch.Tensor, memory: Tensors) -> torch.Tensor:
        return memory.get("ditto/model", model)

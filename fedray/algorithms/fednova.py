"""Changes normalised by how far each client went (Wang et al. 2020, FedNova)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Local, Round, Rows, Tensors


@dataclass(frozen=True)
class FedNova(Algorithm):
    """x ← x − τ Σ p_i d_i with d_i = (x − y_i) / ‖η a_i‖₁ and τ = Σ p_i ‖η a_i‖₁.

    arXiv:2007.07481, section 4. a_i are the weights with which a client's gradients entered its change: of K
    plain steps ‖η a_i‖₁ = K η; momentum and schedules of η are accounted for. What travels as the model is x − d_i.
    Where clients go equally far, it is federated averaging, to float32's rounding.
    """

    @property
    def needs(self) -> dict[str, str]:
        return {
            "sgd": "divides a change by the weights of its gradients, which it has under SGD alone, plain or with "
            "momentum: use --optimizer sgd",
            "fresh optimizer": "needs momentum that begins at 0 in each round: keep no optimizer (--no-keep-optimizer)",
        }

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        reach = local.total_learning_rate  # ‖η a_i‖₁; 0 where a schedule begins at 0: then nothing has moved
        direction = (local.weights - down["model"]) / (reach or 1.0)
        return {"model": down["model"] + direction}, {"reach": reach}, {}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        weights = [round.weight(client, "model") for client in folded.survivors]
        reaches = [rows["reach"] for _, rows in folded.rows]
        reach = math.fsum(w * each for w, each in zip(weights, reaches, strict=True)) / sum(weights)
        return server | {"model": server["model"] + reach * (folded.mean("model") - server["model"])}

    def diagnose(self, before: Tensors, after: Tensors, folded: Folded, round: Round) -> Rows:
        """Return nothing: what clients send are no factors of adapters."""
        return {}

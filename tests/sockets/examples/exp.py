"""A server that steps further, the less the clients' changes agree (Jhunjhunwala et al. 2023, FedExP, equation 6)."""

from dataclasses import dataclass

from fedray import Algorithm


@dataclass(frozen=True)
class FedExP(Algorithm):
    epsilon: float = 1e-3

    def upload(self, local, down, memory):
        change = (local.weights - down["model"]).double()
        return {"model": local.weights}, {"square": change.square().sum().item()}, {}

    def aggregate(self, server, folded, round):
        change = folded.mean("model") - server["model"]
        squares = sum(rows["square"] for _, rows in folded.rows) / len(folded.rows)
        step = max(1.0, squares / (2 * (change.double().square().sum().item() + self.epsilon)))
        return {"model": server["model"] + step * change}

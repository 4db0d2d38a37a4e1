"""An exponential moving average of the global model."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Local, Round, Rows, Tensors, Wrapper
from fedray.algorithms.fedavg import FedAvg
from fedray.lazy import torch
from fedray.vector import Layout


@dataclass(frozen=True)
class EMA(Wrapper):
    """w̄ ← β w̄ + (1 − β) w after every local step, as diffusers' `EMAModel`; samples are drawn from w̄.

    The decay at step k, counted from 1 over the whole run, is 1 − (1 + (k − 1) / inv_gamma) ** −power, up to max_decay.
    Where one client trains, it takes the average at every step. Else the server takes it once a round, decayed for as
    many steps as clients made on average; for one where it may not know them (noise).
    """

    max_decay: float = 0.9999
    algorithm: Algorithm = FedAvg()
    inv_gamma: float = 1.0
    power: float = 0.75

    @property
    def needs(self) -> dict[str, str]:
        why = "makes new factors every round, to which an average of the old ones does not fit: leave the average out"
        return {**self.algorithm.needs, "fixed coordinates": why}

    @property
    def uncounted(self) -> frozenset[str]:
        return self.algorithm.uncounted | {"ema/model", "ema/steps"}

    def decay(self, step: int) -> float:
        """Return β at a step of the whole run."""
        return min(self.max_decay, 1 - (1 + (step - 1) / self.inv_gamma) ** -self.power)

    def init(self, model: torch.Tensor, layout: Layout) -> Tensors:
        average = {"ema/model": model, "ema/steps": torch.zeros(1, dtype=torch.int64)}
        return self.algorithm.init(model, layout) | average

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        down = self.algorithm.broadcast(server, round)
        alone = {name: server[name] for name in ("ema/model", "ema/steps")} if round.clients == 1 else {}
        return down | alone

    def start(self, down: Tensors, memory: Tensors) -> torch.Tensor:
        if "ema/model" in down:
            memory["ema/model"] = down["ema/model"].clone()
        return self.algorithm.start(down, memory)

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        if "ema/model" in memory:
            average, before = memory["ema/model"], int(down["ema/steps"])
            local.watch(lambda: average.lerp_(local.weights, 1 - self.decay(before + local.step)))
        self.algorithm.train(local, down, memory)

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        average = memory.pop("ema/model", None)
        tensors, rows, kept = self.algorithm.upload(local, down, memory)
        return tensors if average is None else tensors | {"ema/model": average}, rows, kept

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        after = self.algorithm.aggregate(server, folded, round)
        examples = sum(rows["examples"] for _, rows in folded.rows)
        mean = sum(rows["examples"] * rows["steps"] for _, rows in folded.rows) / max(1, examples)
        steps, before = max(1, int(math.floor(mean + 0.5))), int(server["ema/steps"])
        if "ema/model" in folded.sums:
            average = folded.mean("ema/model")
        else:
            decay = math.prod(self.decay(before + step) for step in range(1, steps + 1))
            average = server["ema/model"].lerp(after["model"], 1 - decay)
        return after | {"ema/model": average, "ema/steps": server["ema/steps"] + steps}

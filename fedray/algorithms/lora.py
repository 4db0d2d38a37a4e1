"""Methods for adapters: averaging A and B separately (`FedAvg`, the paper's) does not average ΔW = s B A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedray.algorithms import Algorithm, Folded, Round, Tensors
from fedray.lazy import torch
from fedray.vector.adapters import Adapters, WeightedSum

ADAPTERS = {"adapters": "is for adapters (fedray finetune), not for whole models"}
NOTHING: frozenset[str] = frozenset()  # new factors every round: the vector does not mean the same
UPLOADS = {"uploads": "needs each client's own factors, which this fold does not keep: use fold mean"}


@dataclass(frozen=True)
class FFA(Algorithm):
    """FFA-LoRA: freezes A as it was drawn; trains, sends and averages only B: exact, at half the payload.

    Sun et al. 2024 (arXiv:2403.12313).
    """

    needs = ADAPTERS

    @property
    def trains(self) -> Callable[[str], bool]:
        return lambda name: ".lora_B." in name


@dataclass(frozen=True)
class SVD(Algorithm):
    """FlexLoRA: takes the best factors of rank r of Σ w_i s B_i A_i; it loses the tail of the singular values.

    Bai et al. 2024 (arXiv:2402.11505); Eckart and Young 1936.
    """

    needs = ADAPTERS | UPLOADS
    offers = NOTHING

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        adapters = adapters_of(round)
        total = WeightedSum(adapters)
        for upload in folded.uploads:
            total.add(upload.tensors["model"], upload.weights["model"])
        vector = server["model"].clone()
        for (left, right), (b, a) in zip(total.factors(), adapters.factors(vector), strict=True):
            best_b, best_a = best_factors(left, right, b.shape[1])
            b.copy_(best_b / adapters.scale**0.5)
            a.copy_(best_a / adapters.scale**0.5)
        return server | {"model": vector}


@dataclass(frozen=True)
class Flora(Algorithm):
    """FLoRA stacks adapters: it adds Σ w_i s B_i A_i to the base and starts new ones every round: exact.

    Wang et al. 2024 (arXiv:2409.05976). The base's change is dense, float32, and goes down to every client.
    """

    needs = ADAPTERS | UPLOADS | {"float32 base": "needs a float32 base (base_dtype): rounding would lose the change"}
    offers = NOTHING

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        return {name: server[name] for name in ("model", "base") if name in server}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        adapters = adapters_of(round)
        mean, examples = torch.zeros(adapters.base_size), 0
        for upload in folded.uploads:
            if upload.weights["model"] == 0:
                continue
            examples += upload.weights["model"]
            share = upload.weights["model"] / examples
            for part, (b, a) in zip(adapters.changes(mean), adapters.factors(upload.tensors["model"]), strict=True):
                torch.addmm(part, b, a, beta=1 - share, alpha=share * adapters.scale, out=part)
        fresh = torch.zeros_like(server["model"])
        rng = round.rng("rule")
        for _, a in adapters.factors(fresh):
            a.copy_(torch.randn(a.shape, generator=rng) / len(a))  # as peft's "gaussian" draws it; B is 0
        return server | {"model": fresh, "base": mean if "base" not in server else server["base"] + mean}


def adapters_of(round: Round) -> Adapters:
    """Return the round's adapters; `needs` ensures that there are some."""
    assert round.adapters is not None
    return round.adapters


def best_factors(left: torch.Tensor, right: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factors [out, rank] and [rank, in] of the best approximation of left right of that rank, balanced."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    # A client alone, or a layer narrower than the rank, may have fewer directions than the rank.
    found = min(rank, len(s))
    best_left, best_right = left.new_zeros(len(left), rank), right.new_zeros(rank, right.shape[1])
    best_left[:, :found] = q_left @ u[:, :found] * s[:found].sqrt()
    best_right[:found] = s[:found, None].sqrt() * (v[:found] @ q_right.T)
    return best_left, best_right

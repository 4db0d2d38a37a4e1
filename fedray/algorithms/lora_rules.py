"""How adapters become the next adapters. The paper's rule is `FedAvg`: the averages of A and of B apart."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedray.algorithms.rules import FedAvg, ServerState, Update
from fedray.vector.adapters import Adapters, WeightedSum


@dataclass(frozen=True)
class FFA(FedAvg):
    """A stays as it was drawn, and only B is trained, sent and averaged: exact, at half the payload.

    Sun et al. 2024 (FFA-LoRA, arXiv:2403.12313).
    """


@dataclass(frozen=True)
class SVD:
    """The best factors of rank r of Σ w_i s B_i A_i: what is lost is the tail of its singular values.

    Bai et al. 2024 (FlexLoRA, arXiv:2402.11505); Eckart and Young 1936.
    """

    def step(
        self, state: ServerState, updates: Iterable[Update], adapters: Adapters, rng: torch.Generator
    ) -> ServerState:
        total = WeightedSum(adapters)
        for update in updates:
            if update.examples:
                total.add(update.vector, update.examples)
        if not total.examples:
            return state
        vector = state.vector.clone()
        for (left, right), (b, a) in zip(total.factors(), adapters.factors(vector), strict=True):
            best_b, best_a = best_factors(left, right, b.shape[1])
            b.copy_(best_b / adapters.scale**0.5)
            a.copy_(best_a / adapters.scale**0.5)
        return replace(state, vector=vector)


def best_factors(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [out, rank] and [rank, in] of the best approximation of left right of that rank, balanced."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    # A client alone, or a layer narrower than the rank, may have fewer directions than the rank.
    found = min(rank, len(s))
    best_left, best_right = left.new_zeros(len(left), rank), right.new_zeros(rank, right.shape[1])
    best_left[:, :found] = q_left @ u[:, :found] * s[:found].sqrt()
    best_right[:found] = s[:found, None].sqrt() * (v[:found] @ q_right.T)
    return best_left, best_right


@dataclass(frozen=True)
class Flora:
    """Stacking: Σ w_i s B_i A_i itself is folded into the base, and every round starts new adapters: exact.

    Wang et al. 2024 (FLoRA, arXiv:2409.05976). The base's change is dense, float32, and goes down to every client.
    """

    def step(
        self, state: ServerState, updates: Iterable[Update], adapters: Adapters, rng: torch.Generator
    ) -> ServerState:
        mean, examples = torch.zeros(adapters.base_size), 0
        for update in updates:
            if update.examples == 0:
                continue
            examples += update.examples
            share = update.examples / examples
            for part, (b, a) in zip(adapters.changes(mean), adapters.factors(update.vector), strict=True):
                torch.addmm(part, b, a, beta=1 - share, alpha=share * adapters.scale, out=part)
        if not examples:
            return state
        fresh = torch.zeros_like(state.vector)
        for _, a in adapters.factors(fresh):
            a.copy_(torch.randn(a.shape, generator=rng) / len(a))  # as peft's "gaussian" draws it; B is 0
        base = mean if state.base is None else state.base + mean
        return replace(state, vector=fresh, base=base)

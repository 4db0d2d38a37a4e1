"""Methods for adapters: averaging A and B separately (`FedAvg`, the paper's) does not average ΔW = s B A."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from fedray.algorithms import Algorithm, Folded, Local, Round, Rows, Tensors
from fedray.lazy import torch
from fedray.vector.adapters import Adapters, Factors, WeightedSum
from fedray.vector.part import Part

ADAPTERS = {
    "adapters": "is for adapters (fedray finetune), not for whole models",
    "whole vector": "aggregates whole adapters: leave --share and --keep-local out",
}
FLOAT32_BASE = {"float32 base": "needs a float32 base (base_dtype): rounding would lose the change"}
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
class RoLoRA(Algorithm):
    """RoLoRA: clients train, send and average B in odd rounds (from 1) and A in even ones, the other frozen: exact.

    Chen et al. 2025 (arXiv:2502.01755, algorithm 1). Half the payload goes up. Both halves go down: a client that was
    not asked in the last round has neither.
    """

    needs = ADAPTERS | {"equal ranks": "averages halves of adapters of one rank: give one --rank"}
    offers = frozenset({"fixed coordinates"})  # but another half is sent every round

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        half = trained_half(round)
        return {"model": half.take(server["model"]), "frozen": half.rest.take(server["model"])}

    def receive(self, down: Tensors, round: Round) -> Tensors:
        return down | {"model": trained_half(round).join(down["model"], down["frozen"])}

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        frozen = trained_half(local.round).rest
        values = frozen.take(down["model"])
        nothing = torch.zeros_like(values)
        local.watch(lambda: frozen.put(local.weights, values))  # undoes weight decay, and a kept momentum
        local.run(lambda gradient: frozen.put(gradient, nothing))

    def upload(self, local: Local, down: Tensors, memory: Tensors) -> tuple[Tensors, Rows, Tensors]:
        return {"model": trained_half(local.round).take(local.weights)}, {}, {}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        half = trained_half(round)
        return server | {"model": half.join(folded.mean("model"), half.rest.take(server["model"]))}

    def diagnose(self, before: Tensors, after: Tensors, folded: Folded, round: Round) -> Rows:
        half = trained_half(round)
        frozen = half.rest.take(before["model"])
        uploads = [
            replace(upload, tensors={"model": half.join(upload.tensors["model"], frozen)}) for upload in folded.uploads
        ]
        return super().diagnose(before, after, replace(folded, uploads=uploads), round)


@dataclass(frozen=True)
class SVD(Algorithm):
    """FlexLoRA: takes the best factors of rank r of Σ w_i s B_i A_i; it loses the tail of the singular values.

    Bai et al. 2024 (arXiv:2402.11505); Eckart and Young 1936.
    """

    needs = ADAPTERS | UPLOADS
    offers = NOTHING

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        return server | {"model": best_adapters([weighted_sum(folded, round)], round)}


@dataclass(frozen=True)
class RaFLoRA(Algorithm):
    """raFLoRA: as `SVD`, but each block of ranks is averaged over the clients that have it, where ranks are unequal.

    Wu et al. 2026 (arXiv:2602.13486). With weights over all clients, what only some have fades round by round.
    """

    needs = ADAPTERS | UPLOADS
    offers = NOTHING

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        adapters, sums = adapters_of(round), []
        for low, high in pairwise(adapters.edges):
            total = WeightedSum(adapters)
            block = adapters.block(low, high)
            for upload in folded.uploads:
                if adapters.rank(upload.client) >= high:
                    total.add(upload.tensors["model"] * block, upload.weights["model"])
            if not total.examples:  # nobody who has it took part: it stays
                total.add(server["model"] * block, 1)
            sums.append(total)
        return server | {"model": best_adapters(sums, round)}


class OnBase(Algorithm):
    """A method whose new adapters (B, A) leave something of the mean to the base: W ← W + s (Σ w_i B_i A_i − B A).

    So every one is exact, whatever its adapters. The base's change goes down to every client whole, as factors to which
    each round adds columns, or as what is shorter: of a layer, once its factors would be longer, their product.
    """

    abstract = True
    needs = ADAPTERS | UPLOADS | FLOAT32_BASE

    def columns(self, clients: Sequence[int], adapters: Adapters) -> int:
        """Return how many columns a round of these clients adds to the factors."""
        raise NotImplementedError

    def divide(self, folded: Folded, round: Round) -> tuple[torch.Tensor, Iterator[Factors]]:
        """Return the new adapters [d]; and, of each layer, factors of what they leave of the mean."""
        raise NotImplementedError

    def broadcast(self, server: Tensors, round: Round) -> Tensors:
        return {name: server[name] for name in ("model", "base") if name in server}

    def aggregate(self, server: Tensors, folded: Folded, round: Round) -> Tensors:
        after, left = self.divide(folded, round)
        base = adapters_of(round).grown(server.get("base"), left)
        return server | {"model": after} | ({"base": base} if len(base) else {})  # a client alone may leave nothing

    def growth(self, round: Round, rounds: int) -> int:
        adapters = adapters_of(round)
        return 4 * adapters.base_length(rounds * self.columns(round.cohort, adapters))


@dataclass(frozen=True)
class FedEx(OnBase):
    """FedEx-LoRA: averages A and B, and adds the residual s (Σ w_i B_i A_i − B̄ Ā) to the base: exact.

    Singhal et al. 2024 (arXiv:2410.09432, equation 10). Of K clients the residual is Σ w_i (B_i − B̄) (A_i − A_1), in
    which the first has no part: (K − 1) r columns.
    """

    def columns(self, clients: Sequence[int], adapters: Adapters) -> int:
        return (len(clients) - 1) * max(adapters.ranks)

    def divide(self, folded: Folded, round: Round) -> tuple[torch.Tensor, Iterator[Factors]]:
        adapters, mean = adapters_of(round), folded.mean("model")
        total = sum(upload.weights["model"] for upload in folded.uploads)

        def residuals() -> Iterator[Factors]:
            first, *others = (upload.tensors["model"] for upload in folded.uploads)
            weights = [adapters.scale * upload.weights["model"] / total for upload in folded.uploads[1:]]
            for (b, a), (_, a_1), *each in zip(*map(adapters.factors, (mean, first, *others)), strict=True):
                lefts = [w * (b_i.double() - b.double()) for w, (b_i, _) in zip(weights, each, strict=True)]
                rights = [a_i.double() - a_1.double() for _, a_i in each]
                yield torch.cat([b[:, :0], *lefts], dim=1), torch.cat([a[:0], *rights])

        return mean, residuals()


@dataclass(frozen=True)
class Flora(OnBase):
    """FLoRA stacks adapters: it adds Σ w_i s B_i A_i to the base and starts new ones every round: exact.

    Wang et al. 2024 (arXiv:2409.05976). With `warm`, the new ones are the best of rank r of that mean, as `SVD` takes
    them, and the base gets the rest.
    """

    warm: bool = False
    offers = NOTHING

    def columns(self, clients: Sequence[int], adapters: Adapters) -> int:
        return max(0, sum(map(adapters.rank, clients)) - (max(adapters.ranks) if self.warm else 0))

    def divide(self, folded: Folded, round: Round) -> tuple[torch.Tensor, Iterator[Factors]]:
        adapters, rng, after = adapters_of(round), round.rng("rule"), torch.zeros(round.layout.size)
        if self.warm:
            return self._best(folded, round)
        for _, a in adapters.factors(after):
            a.copy_(torch.randn(a.shape, generator=rng) / len(a))  # as peft's "gaussian" draws it; B is 0
        total = sum(upload.weights["model"] for upload in folded.uploads)
        weights = [adapters.scale * upload.weights["model"] / total for upload in folded.uploads]
        ranks = [adapters.rank(upload.client) for upload in folded.uploads]

        def stacked() -> Iterator[Factors]:
            for each in zip(*(adapters.factors(upload.tensors["model"]) for upload in folded.uploads), strict=True):
                lefts = [w * b[:, :rank].double() for w, rank, (b, _) in zip(weights, ranks, each, strict=True)]
                yield torch.cat(lefts, dim=1), torch.cat([a[:rank] for rank, (_, a) in zip(ranks, each, strict=True)])

        return after, stacked()

    def _best(self, folded: Folded, round: Round) -> tuple[torch.Tensor, Iterator[Factors]]:
        adapters, after = adapters_of(round), torch.zeros(round.layout.size)
        rest, columns = [], self.columns(folded.survivors, adapters)
        for (b, a), factors in zip(adapters.factors(after), weighted_sum(folded, round).factors(), strict=True):
            left, right = components(*factors, b.shape[1] + columns)
            b.copy_(left[:, : b.shape[1]] / adapters.scale**0.5)
            a.copy_(right[: len(a)] / adapters.scale**0.5)
            rest.append((left[:, b.shape[1] :], right[len(a) :]))
        return after, iter(rest)


def adapters_of(round: Round) -> Adapters:
    """Return the round's adapters; `needs` ensures that there are some."""
    assert round.adapters is not None
    return round.adapters


def trained_half(round: Round) -> Part:
    """Return the half of the adapters that RoLoRA trains in a round: B first, as a new adapter's A has no gradient."""
    kind = ".lora_A." if round.number % 2 else ".lora_B."
    return Part.of(round.layout, lambda name: kind in name)


def weighted_sum(folded: Folded, round: Round) -> WeightedSum:
    """Return Σ w_i s B_i A_i as factors."""
    total = WeightedSum(adapters_of(round))
    for upload in folded.uploads:
        total.add(upload.tensors["model"], upload.weights["model"])
    return total


def best_adapters(sums: Sequence[WeightedSum], round: Round) -> torch.Tensor:
    """Return the adapters [d] of rank r nearest to the total of some sums."""
    adapters, vector = adapters_of(round), torch.zeros(round.layout.size)
    layers = zip(*(each.factors() for each in sums), strict=True)
    for factors, (b, a) in zip(layers, adapters.factors(vector), strict=True):
        lefts, rights = zip(*factors, strict=True)
        best_b, best_a = components(torch.cat(lefts, dim=1), torch.cat(rights), b.shape[1])
        b.copy_(best_b / adapters.scale**0.5)
        a.copy_(best_a / adapters.scale**0.5)
    return vector


def components(left: torch.Tensor, right: torch.Tensor, count: int) -> Factors:
    """Return factors [out, count] and [count, in] of the best approximation of left right of that rank, balanced.

    They are ordered by its singular values, the largest first; zeros where it has fewer.
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T)
    # A client alone, or a layer narrower than the rank, may have fewer directions than the rank.
    found = min(count, len(s))
    best_left, best_right = left.new_zeros(len(left), count), right.new_zeros(count, right.shape[1])
    best_left[:, :found] = q_left @ u[:, :found] * s[:found].sqrt()
    best_right[:found] = s[:found, None].sqrt() * (v[:found] @ q_right.T)
    return best_left, best_right

"""Where clients' adapters have unequal ranks, what becomes of the higher ranks? No training: linear algebra alone.

    python experiments/rank_collapse.py
    python experiments/rank_collapse.py --out analysis/results/rank_collapse.csv

Twelve equal clients of ranks 4, 8 and 16 in turn, on layers of Stable Diffusion's sizes. Each round every client gets
the adapters cut to its rank, changes them, and the server aggregates: fedavg pads with zeros, svd takes the best
factors of the mean of B·A (FlexLoRA), raflora averages each block of ranks over the clients that have it (Wu et al.
2026, arXiv:2602.13486). Energy is the sum of squares of singular values of ΔW; the table has the shares of ranks 5 to 8
and of ranks 9 to 16.

Clients that learn nothing show the factor per round: of 12 clients 8 have rank 8 and 4 have rank 16, so svd multiplies
those singular values by 2/3 and 1/3, and zero padding, which averages both factors, by their squares.
Clients that learn add random steps to what they have, half of each in common.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
import tyro

import fedray
from fedray.algorithms import Round, Upload
from fedray.commands.terminal import print_frame
from fedray.seeds import generator
from fedray.vector import Layout
from fedray.vector.adapters import Adapters

SHAPES = {"self": (320, 320), "cross": (320, 768)}  # (out, in) of a layer
RANKS = (4, 8, 16)
CLIENTS = 12
RULES = {"fedavg": fedray.FedAvg(), "svd": fedray.SVD(), "raflora": fedray.RaFLoRA()}
NAMES = {
    f"{layer}.lora_{which}.default.weight": (max(RANKS), columns) if which == "A" else (rows, max(RANKS))
    for layer, (rows, columns) in SHAPES.items()
    for which in "AB"
}
LAYOUT = Layout(tuple(NAMES), tuple(NAMES.values()))
ADAPTERS = Adapters(LAYOUT, 1.0, {}, SHAPES, RANKS)


def start(seed: int) -> torch.Tensor:
    """Adapters whose ΔW has 16 equal singular values."""
    rng, vector = generator(seed, "start"), torch.zeros(LAYOUT.size)
    for b, a in ADAPTERS.factors(vector):
        b.copy_(torch.linalg.qr(torch.randn(b.shape, generator=rng)).Q)
        a.copy_(torch.linalg.qr(torch.randn(a.T.shape, generator=rng)).Q.T)
    return vector


def rounds(rule: fedray.Algorithm, learning: float, count: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the adapters at the start and after each round. `learning` is the size of a step, in their own."""
    fold, server = fedray.Mean(), {"model": start(seed)}
    yield server["model"]
    for number in range(count):
        cohort = tuple(range(CLIENTS))
        round = Round(number, seed, cohort, CLIENTS, dict.fromkeys(cohort, 1), LAYOUT, ADAPTERS)
        partial, common = fold.start(round), torch.randn(LAYOUT.size, generator=round.rng("common"))
        for client in cohort:
            step = (common + torch.randn(LAYOUT.size, generator=round.rng("step", client))) / 2**0.5
            vector = server["model"] + learning * server["model"].square().mean().sqrt() * step
            ADAPTERS.cut(vector, client)
            partial = fold.add(partial, Upload(client, {"model": vector}, {"model": 1}), round)
        server = rule.aggregate(server, fold.result(partial, round), round)
        yield server["model"]


def energy(vector: torch.Tensor) -> list[float]:
    """Return the shares of ranks 5 to 8, and 9 to 16, in the energy of ΔW; the mean over layers."""
    shares = []
    for b, a in ADAPTERS.factors(vector.double()):
        values = torch.linalg.svdvals(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T).square()
        shares.append(torch.stack([part.sum() for part in values.split([4, 4, 8])]) / values.sum())
    return torch.stack(shares).mean(0)[1:].tolist()


def main(seeds: tuple[int, ...] = (0, 1, 2), count: int = 30, out: Path | None = None) -> None:
    """Print the table.

    Args:
        seeds: starts and steps, over which shares are averaged.
        count: rounds.
        out: a file for all of it, as CSV.
    """
    rows = [
        {"rule": name, "step": learning, "round": number, "seed": seed, "ranks 5-8": middle, "ranks 9-16": high}
        for learning in (0.0, 0.1)
        for name, rule in RULES.items()
        for seed in seeds
        for number, (middle, high) in enumerate(map(energy, rounds(rule, learning, count, seed)))
    ]
    frame = pd.DataFrame(rows)
    if out is not None:
        frame.to_csv(out, index=False, float_format="%.4g")
    shown = frame[frame["round"].isin([0, 1, 2, 3, 5, 10, 20, count])].drop(columns="seed")
    mean = shown.groupby(["rule", "step", "round"], sort=False).mean()
    print_frame(mean.map("{:.2g}".format).reset_index().astype(str).set_index("rule"))


if __name__ == "__main__":
    tyro.cli(main)

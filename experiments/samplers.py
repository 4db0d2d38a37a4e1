"""Which sampler for frequent evaluation? The scores and the seconds of each, on one trained model.

    python experiments/samplers.py RUN [--samples 512]

RUN is a directory of `fedray train` with --features. Samples are drawn in this process, on one thread. Writes
samplers.csv and samplers.png (the first samples of each) to RUN.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import tyro
from rich.console import Console
from rich.table import Table

import fedray
from fedray.commands.sample import model_of
from fedray.commands.terminal import progress
from fedray.federation.evaluation import Comparison, Scoring, evaluate, open_reference, prompts_of
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.sampling import Sampling

SAMPLERS = (
    ("ddpm", 1000), ("ddpm", 100), ("ddim", 50), ("ddim", 100), ("dpmsolver++", 20), ("sde-dpmsolver++", 20),
    ("sde-dpmsolver++", 50), ("unipc", 10), ("unipc", 20), ("heun", 10), ("euler", 20), ("euler", 50),
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    run: tyro.conf.Positional[Path]
    """Directory of a run."""
    samples: int = 512
    """Images drawn by each sampler."""


def main(asked: Question) -> None:
    base = replace(fedray.Run.open(asked.run).config, actors=0)
    scoring = Scoring.of(base)
    if scoring is None:
        raise fedray.UserError(f"the run at {asked.run} names no features (--features) to be scored on.")
    plan = make_plan(base)
    model, prompts = model_of(asked.run, base), prompts_of(base, plan.dataset)
    rows, grids = [], {}
    for sampler, steps in SAMPLERS:
        config = replace(base, sampler=sampler, sampling_steps=steps)
        pool = LocalPool(config, plan.dataset)
        with progress(1) as (_, show):
            reference = open_reference(scoring, plan.dataset, pool, show)
            comparison = Comparison(plan.dataset, scoring, reference, intervals=False)
            began = time.perf_counter()
            found = evaluate(pool, model, Sampling.of(config, asked.samples, prompts), comparison, show=show)
            seconds = time.perf_counter() - began
        scores = {name: score.value for name, score in found.scores.items()}
        rows.append({"sampler": f"{sampler}-{steps}", **scores, "seconds": seconds})
        grids[f"{sampler}-{steps}"] = fedray.grid(torch.from_numpy(found.images[:32]), columns=4)
    table = pd.DataFrame(rows).set_index("sampler")
    table.to_csv(asked.run / "samplers.csv")
    names = [name for name in map(str, table) if "@" not in name and "/" not in name]
    shown = Table("sampler", *(name.replace("[", r"\[") for name in names))
    for name, values in table[names].iterrows():
        shown.add_row(str(name), *(f"{value:.3g}" for value in values))
    Console().print(shown)
    figure, axes = plt.subplots(1, len(grids), figsize=(2.2 * len(grids), 4.8), layout="constrained")
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        axis.imshow(grid)
        axis.set_title(name)
        axis.axis("off")
    figure.savefig(asked.run / "samplers.png", dpi=100)
    print(f"table     {asked.run / 'samplers.csv'}\npicture   {asked.run / 'samplers.png'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Question))
    except fedray.UserError as error:
        raise SystemExit(f"samplers.py: {error}") from None

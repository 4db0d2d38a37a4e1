"""What does each way of aggregating adapters lose, cost and reach?

The four clients of lora_digits.py (one digit each that the base has never seen), with each algorithm: fedavg averages
A and B separately (the paper's), ffa freezes A, svd takes the best factors of the mean of B·A, flora adds that mean to
the base. A row's aggregation error is ‖ΔW − Σ w_i ΔW_i‖ / ‖Σ w_i ΔW_i‖; the table has its mean over layers and rounds.

    python experiments/lora_rules.py --seeds 0 1 2

flora starts new adapters every round, so no algorithm keeps optimizers here: they differ in nothing else.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from lora_digits import PRESET, photos
from rich.console import Console
from rich.table import Table

import fedray
from fedray.cluster.connection import connected
from fedray.commands.terminal import progress

RULES: dict[str, fedray.Algorithm] = {
    "fedavg": fedray.FedAvg(), "ffa": fedray.FFA(), "svd": fedray.SVD(), "flora": fedray.Flora()
}  # fmt: skip


def main(
    seeds: tuple[int, ...] = (0,),
    rounds: int = PRESET.rounds,
    learning_rate: float = 5e-3,
    out: Path | None = None,
    actors: int | None = None,
) -> None:
    """Fine-tune with each rule and compare; runs that are in OUT already are not repeated.

    Args:
        seeds: one run of each rule for each.
        rounds: communication rounds.
        learning_rate: of all of them.
        out: directory of the runs; by default runs/lora-rules-DATE-TIME.
        actors: client actors of a run; 0 trains in this process, without Ray.
    """
    out = out or Path("runs") / time.strftime("lora-rules-%Y%m%d-%H%M%S")
    rows = []
    with nullcontext() if actors == 0 else connected(None):
        for seed in seeds:
            task = replace(PRESET.task, train_data_dir=str(photos(out, seed)))
            for name, rule in RULES.items():
                config = replace(
                    PRESET, task=task, seed=seed, rounds=rounds, algorithm=rule, keep_optimizer=False,
                    learning_rate=learning_rate, validation_rounds=rounds, actors=actors,
                )  # fmt: skip
                print(f"\n{name}, seed {seed}")
                directory = out / f"{name}-{seed}"
                with progress(rounds) as (_, show):
                    run = fedray.run(config, directory, resume=(directory / "config.json").exists(), show=show)
                table = fedray.summary({name: directory}).iloc[0].to_dict()
                error = float(np.mean([row["aggregation"]["error_mean"] for row in run.rows]))
                rows.append(
                    {"rule": name, "seed": seed, "aggregation error": error} | {str(k): v for k, v in table.items()}
                )
    frame = pd.DataFrame(rows)
    frame.to_csv(out / "summary.csv", index=False)
    names = ["aggregation error", "accuracy[digits]", "fd[digits]", "MB down", "MB up", "seconds"]
    mean, std = (frame.groupby("rule", sort=False)[names].agg(what) for what in ("mean", "std"))
    shown = Table("rule", *(name.replace("[", r"\[") for name in names))
    for rule in mean.index:
        cells = zip(mean.loc[rule], std.loc[rule].fillna(0), strict=True)
        shown.add_row(str(rule), *(f"{value:.3g}" + (f" ± {spread:.2g}" if spread else "") for value, spread in cells))
    Console().print(shown)
    print(f"table     {out / 'summary.csv'}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"lora_rules.py: {error}") from None

"""What does each way of aggregating adapters lose, cost and reach, each at its own best learning rate?

The four clients of lora_digits.py (one digit each that the base has never seen), with each algorithm: fedavg averages
A and B separately (the paper's), ffa freezes A, rolora trains A and B by turns, svd takes the best factors of the mean
of B·A, flora adds that mean to the base (warm: what svd leaves of it), fedex what fedavg loses. Of unequal ranks 4, 8,
16 and 4, fedavg pads with zeros, and raflora averages each block of ranks over the clients that have it. A row's
aggregation error is ‖ΔW − Σ w_i ΔW_i‖ / ‖Σ w_i ΔW_i‖; the table has its mean over layers and rounds.

    python experiments/lora_rules.py
    python experiments/lora_rules.py --smoke        one round of two steps, two rates, few samples: a minute

Each algorithm is tried with every learning rate on a tuning seed; the rate that is best by prompt accuracy, and the one
that is best by fd, then train on fresh seeds, which alone are reported. ffa and rolora have twice the rank, so that
clients send as many bytes. Optimizers are fresh each round (svd and flora make new factors, to which an old one does
not fit), and, of fedavg and ffa, also kept: of rolora and fedex too, all would take two hours on two cores, not one and
a half.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
from lora_digits import PRESET, photos
from rich.console import Console
from rich.table import Table

import fedray
from fedray.cluster.connection import connected
from fedray.commands.terminal import progress

ONCE: Any = PRESET.task
TWICE = replace(ONCE, rank=2 * ONCE.rank)  # of which half, the factors B or A, is trained and sent
UNEQUAL = replace(ONCE, rank=(ONCE.rank // 2, ONCE.rank, 2 * ONCE.rank))  # of four clients as many in all
RULES: dict[str, dict[str, Any]] = {
    "fedavg": {"algorithm": fedray.FedAvg()},
    "fedavg, kept": {"algorithm": fedray.FedAvg(), "keep_optimizer": True},
    "ffa": {"algorithm": fedray.FFA(), "task": TWICE},
    "ffa, kept": {"algorithm": fedray.FFA(), "task": TWICE, "keep_optimizer": True},
    "rolora": {"algorithm": fedray.RoLoRA(), "task": TWICE},
    "svd": {"algorithm": fedray.SVD()},
    "flora": {"algorithm": fedray.Flora()},
    "flora, warm": {"algorithm": fedray.Flora(warm=True)},
    "fedex": {"algorithm": fedray.FedEx()},
    "fedavg, unequal": {"algorithm": fedray.FedAvg(), "task": UNEQUAL},
    "svd, unequal": {"algorithm": fedray.SVD(), "task": UNEQUAL},
    "raflora, unequal": {"algorithm": fedray.RaFLoRA(), "task": UNEQUAL},
}
METRICS = {"accuracy[digits]": "idxmax", "fd[digits]": "idxmin"}  # and where the best is
SHOWN = ["aggregation error", *METRICS, "MB down", "MB up", "seconds"]


def main(
    seeds: tuple[int, ...] = (1, 2, 3),
    tuning_seed: int = 0,
    rates: tuple[float, ...] = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    rounds: int = PRESET.rounds,
    out: Path | None = None,
    actors: int | None = None,
    smoke: bool = False,
) -> None:
    """Tune each rule, fine-tune with its best rates and compare; runs that are in OUT already are not repeated.

    Args:
        seeds: one run of each rule for each, in the report.
        tuning_seed: the seed that learning rates are chosen on.
        rates: the learning rates to choose from.
        rounds: communication rounds.
        out: directory of the runs; by default runs/lora-rules-DATE-TIME.
        actors: client actors of a run; 0 trains in this process, without Ray.
        smoke: try it out, with one round of two steps, two rates, one seed and few samples.
    """
    if tuning_seed in seeds:
        raise fedray.UserError(f"--tuning-seed {tuning_seed} is one of the seeds of the report, which must be fresh.")
    if smoke:
        rounds, rates, seeds = 1, rates[1:3], seeds[:1]
    out = out or Path("runs") / time.strftime("lora-rules-%Y%m%d-%H%M%S")
    with nullcontext() if actors == 0 else connected(None):

        def run(rule: str, rate: float, seed: int) -> dict[str, Any]:
            base = replace(PRESET, keep_optimizer=False, rounds=rounds, validation_rounds=rounds, actors=actors)
            base = replace(base, local_steps=2, evaluate_samples=20, sampling_steps=2) if smoke else base
            config = replace(base, seed=seed, learning_rate=rate, **RULES[rule])
            config = replace(config, task=replace(config.task, train_data_dir=str(photos(out, seed))))
            return finetune(config, out / f"{rule.replace(', ', '-')}-{rate:g}-{seed}", rule)

        tuning = pd.DataFrame([run(rule, rate, tuning_seed) for rule in RULES for rate in rates])
        tuning.to_csv(out / "tuning.csv", index=False)
        chosen = best(tuning)
        wanted = dict.fromkeys((rule, rate) for rule, by_metric in chosen.items() for rate in by_metric.values())
        report = pd.DataFrame([run(rule, rate, seed) for rule, rate in wanted for seed in seeds])
    report.to_csv(out / "summary.csv", index=False)
    for metric in METRICS:
        show(report, {rule: chosen[rule][metric] for rule in RULES}, metric)
    print(f"tables    {out / 'tuning.csv'}, {out / 'summary.csv'}")


def finetune(config: fedray.Config, directory: Path, rule: str) -> dict[str, Any]:
    """One run, continued if it was begun before: a row of the tables."""
    print(f"\n{rule}, learning rate {config.learning_rate:g}, seed {config.seed}")
    with progress(config.rounds) as (_, show):
        run = fedray.run(config, directory, resume=(directory / "config.json").exists(), show=show)
    scores = fedray.summary({rule: directory}).iloc[0].to_dict()
    error = float(np.mean([row["aggregation"]["error_mean"] for row in run.rows]))
    about = {"rule": rule, "learning rate": config.learning_rate, "seed": config.seed, "aggregation error": error}
    return about | {str(name): value for name, value in scores.items()}


def best(tuning: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The learning rate that is best by each metric, of each rule."""
    chosen: dict[str, dict[str, float]] = {}
    for rule, rows in tuning.groupby("rule", sort=False):
        by_rate = rows.set_index("learning rate")
        chosen[str(rule)] = {metric: getattr(by_rate[metric], which)() for metric, which in METRICS.items()}
    return chosen


def show(report: pd.DataFrame, rates: dict[str, float], metric: str) -> None:
    """Mean and standard deviation over the seeds, of each rule at the rate that was chosen by a metric."""
    shown = Table("rule", "learning rate", *(name.replace("[", r"\[") for name in SHOWN))
    shown.title = f"rates chosen by {metric}".replace("[", r"\[")
    for rule, rate in rates.items():
        runs = report[(report["rule"] == rule) & (report["learning rate"] == rate)][SHOWN]
        cells = zip(runs.mean(), runs.std(), strict=True)
        text = [f"{mean:.3g}" + ("" if pd.isna(std) else f" ± {std:.2g}") for mean, std in cells]
        shown.add_row(rule, f"{rate:g}", *text)
    Console().print(shown)


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"lora_rules.py: {error}") from None

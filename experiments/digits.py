"""How close does federated training come to centralised training?

Four clients hold a quarter of the digits each; one client holds all of them. The one trains once for as many sequential
steps as a federated client makes (the paper's comparison: the federation computes four times as much), and once for as
many passes over the data (the same compute, four times the steps).

    python experiments/digits.py --seeds 0 1 2 --repeats 4      the question, with its spread over seeds and over draws
    python experiments/digits.py --no-same-passes               `make demo`
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
import tyro

import fedray
from fedray.cluster.connection import connected
from fedray.commands.terminal import print_table, program, progress
from fedray.data.sources import digits

FEDERATED = fedray.PRESETS["digits"]  # C=4, E=4


def settings(seed: int, rounds: int, repeats: int, same_passes: bool) -> dict[str, fedray.Config]:
    """The runs of one seed, by name."""
    federated = replace(FEDERATED, seed=seed, rounds=rounds, evaluate_repeats=repeats)
    alone = replace(federated, clients=1)
    steps = federated.steps(len(digits()) // federated.clients)
    runs = {
        "federated": federated,
        "centralised, same steps": replace(alone, local_epochs=None, local_steps=steps),
        "centralised, same passes": alone,
    }
    return runs if same_passes else {name: runs[name] for name in list(runs)[:2]}


def train(config: fedray.Config, out: Path, name: str) -> Path:
    """One run, continued if it was begun before."""
    print(f"\n{name}, seed {config.seed}")
    with progress(config.rounds) as (on_row, show):
        fedray.run(config, out, resume=(out / "config.json").exists(), on_row=on_row, show=show)
    return out


def picture(runs: dict[str, Path], path: Path) -> None:
    """Real digits beside the samples of each run."""
    images = torch.from_numpy(digits().images[:64].copy())
    grids = {"real digits": fedray.grid(images)} | {name: plt.imread(out / "samples.png") for name, out in runs.items()}
    figure, axes = plt.subplots(1, len(grids), figsize=(4 * len(grids), 4.3), layout="constrained")
    for axis, (name, grid) in zip(axes, grids.items(), strict=True):
        axis.imshow(grid)
        axis.set_title(name)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def ratios(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Federated ÷ centralised, mean and standard deviation over the seeds."""
    score = pd.DataFrame([table["fd[digits]"] for table in tables])
    ratio = score.rdiv(score["federated"], axis=0).drop(columns="federated")
    return pd.DataFrame({"fd[digits], federated ÷": ratio.mean(), "std": ratio.std(), "seeds": len(tables)})


def main(
    seeds: tuple[int, ...] = (0,),
    rounds: int = FEDERATED.rounds,
    repeats: int = 1,
    same_passes: bool = True,
    out: Path | None = None,
    actors: int | None = None,
) -> None:
    """Train and compare; runs that are in OUT already are not repeated.

    Args:
        seeds: one federation and its baselines for each.
        rounds: communication rounds.
        repeats: sets of samples that each model is scored on.
        same_passes: also train the centralised baseline of the same passes, the longest of the three.
        out: directory of the runs; by default runs/digits-DATE-TIME.
        actors: client actors of a run; 0 trains in this process, without Ray.
    """
    out = out or Path("runs") / time.strftime("digits-%Y%m%d-%H%M%S")
    tables = []
    with nullcontext() if actors == 0 else connected(None):
        for seed in seeds:
            configs = settings(seed, rounds, repeats, same_passes)
            runs = {
                name: train(
                    replace(config, actors=actors), out / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}", name
                )
                for name, config in configs.items()
            }
            print_table(runs)
            tables.append(fedray.summary(runs))
            if seed == seeds[0]:
                picture(runs, out / "samples.png")
                first = runs["federated"]
    pd.concat(dict(zip(seeds, tables, strict=True)), names=["seed", "run"]).to_csv(out / "summary.csv")
    if len(seeds) > 1:
        scores = fedray.score_table(path.parent for path in sorted(out.glob("*/result.json")))
        print(scores.set_index(["score", "run"]).sort_index().to_string(float_format="{:.3g}".format, na_rep=""))
        print(ratios(tables).to_string(float_format="{:.2f}".format))
    print(f"samples   {out / 'samples.png'}")
    print(f"run       {first}")
    print(f"next      {program()} sample {first} --num-images 100 --seed 1")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"digits.py: {error}") from None

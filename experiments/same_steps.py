"""What is the effect of the number of clients itself, of averaging more often, and of training on more images?

    fedray sweep experiments/same_steps.py --out runs/steps
    fedray sweep experiments/same_images.py --out runs/steps
    python experiments/same_steps.py runs/steps

At fixed rounds and local epochs (Chen 2024, figure 2) more clients make fewer steps each. At equal sequential steps,
with E fixed and T in proportion to C, the steps between two averagings fall with C, and the images seen rise. Here
local steps n and rounds T have n·T = 1,200 for every number of clients, so that C and n vary apart, with optimizers
kept and fresh; same_images.py varies C at equal images. The last command separates the three effects.
"""

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
from scipy import stats

import fedray
from fedray.reports.results import finals

BASE = replace(fedray.PRESETS["digits"], local_epochs=None, local_steps=30, evaluate_samples=2048)
SPACE = {
    "local_steps": [15, 30, 60],
    "rounds": lambda config: 30 * config.rounds // config.local_steps,
    "clients": [1, 2, 4, 8],
    "keep_optimizer": [True, False],
    "seed": [0, 1, 2, 3, 4],
}
SMOKE = fedray.SMOKE | {"local_steps": [15, 30], "clients": [1, 2], "keep_optimizer": [True], "seed": [0, 1]}
FACTORS = {"clients": "clients", "local_steps": "steps between averagings", "total.images": "images"}


def effects(rounds: pd.DataFrame, score: str = "fd[digits]") -> pd.DataFrame:
    """Separate the effects on a score: by how many percent it changes where one factor doubles and the others stay.

    Least squares of log score on the factors' logs, with a constant for each seed; 95 % intervals of Student's t. A
    factor that follows from the others in these runs (images, in same_steps.py alone) is left out.
    """
    done = finals(rounds).dropna(subset=[score])
    logs = done[[*FACTORS, score]].astype(float).apply(np.log2)
    columns = pd.get_dummies(done["seed"], prefix="seed", dtype=float)
    for factor in FACTORS:
        wider = columns.assign(**{factor: logs[factor]})
        if np.linalg.matrix_rank(wider) == wider.shape[1]:
            columns = wider
    design, freedom = columns.to_numpy(), len(columns) - columns.shape[1]
    logged = logs[score].to_numpy()
    slopes, *_ = np.linalg.lstsq(design, logged, rcond=None)
    variance = ((logged - design @ slopes) ** 2).sum() / freedom
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    table = pd.DataFrame({"change": slopes, "low": slopes - half, "high": slopes + half}, index=columns.columns)
    percent = 100 * (2 ** table.loc[[name for name in FACTORS if name in table.index]] - 1)
    return percent.rename(index=FACTORS).rename_axis("doubling")


def main(place: str) -> None:
    rounds = fedray.load(place).rounds
    for kept, part in rounds.groupby("keep_optimizer"):
        print(f"optimizers {'kept' if kept else 'fresh'}: change of fd[digits] in percent, with its 95 % interval")
        print(effects(part).to_string(float_format="{:.1f}".format))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Is there an ε at which a model tells nothing of the clients that it was trained on, and still draws digits?

    fedray sweep experiments/privacy.py --out runs/privacy
    python experiments/privacy.py runs/privacy         attacks each of its runs, and prints the table

The digits among 400 clients, of four images each, and 40 clients more that may hold a canary. Their updates are clipped
to a norm that follows the median; noise on their sum proves ε = 1, 4 or 8 at δ = 1e-3 for a client, or there is none
(∞). Beside fd[digits] the table has what attacks find: the area under the curve of membership inference by loss (0.5
finds nothing), the exposure of canaries and the ε that they prove to be spent at least, and the share of samples that
are nearer to an image trained on than 5 % of new images are.

Twelve runs of 60 rounds: about an hour on two cores, and a minute or two a run for the attacks.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro

import fedray
from fedray.commands.terminal import print_frame
from fedray.federation.audit import audit, audit_canaries
from fedray.federation.copying import audit_copies
from fedray.federation.delivered import model_of, sampling_of
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.record.run import Run

CLIP = "clip:1:quantile=0.5"

BASE = replace(
    fedray.PRESETS["digits"], clients=440, canaries=40, cohort=fedray.Poisson(0.25), rounds=60, train_batch_size=4,
    keep_optimizer=False, test_share=0.2, delta=1e-3,
)  # fmt: skip
SPACE = {
    "target_epsilon": [1.0, 4.0, 8.0, None],
    "wire": lambda config: f"{CLIP},noise" if config.target_epsilon else f"{CLIP},noise:0",
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"target_epsilon": [8.0, None], "seed": [0, 1]}


def audited(directory: Path, images: int = 400, samples: int = 256) -> dict[str, Any]:
    """Attack a run's model: a row of the table."""
    run = Run.open(directory)
    config, result = replace(run.config, actors=0), run.result
    assert result is not None
    plan = make_plan(config)
    pool, shared = LocalPool(config, plan.dataset), model_of(run, config)
    found, _ = audit(pool, shared, plan, run.rows, 0, images)
    canaries = audit_canaries(pool, shared, plan, config.delta, 0)
    (copied,) = audit_copies(pool, shared, plan, run.rows, sampling_of(run, config, samples, 0), None).values()
    scores = {name: result["scores"][name]["value"] for name in ("fd[digits]",) if name in result["scores"]}
    return {
        "ε": result["privacy"]["epsilon"] or np.inf,
        "seed": config.seed,
        **scores,
        "membership": found.auc[0],
        "exposure": np.nan if canaries is None else canaries.exposure[0],
        "ε at least": np.nan if canaries is None else canaries.epsilon,
        "copies": copied.share,
    }


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, by ε."""
    frame = pd.DataFrame(rows)
    frame["ε"] = frame["ε"].round(1)
    grouped = frame.drop(columns="seed").groupby("ε")
    mean, std = grouped.mean(), grouped.std()
    return pd.DataFrame({name: _cells(mean[name], std[name]) for name in mean}, index=mean.index)


def _cells(mean: Iterable[float], std: Iterable[float]) -> list[str]:
    return [f"{m:.3g}" + ("" if np.isnan(s) else f" ± {s:.2g}") for m, s in zip(mean, std, strict=True)]


def main(out: tyro.conf.Positional[Path], images: int = 400, samples: int = 256) -> None:
    """Attack the runs of a sweep.

    Args:
        out: directory of the sweep.
        images: how many images of each kind, at most, membership inference is tried on.
        samples: how many images are sampled, to look for copies.
    """
    done = sorted(path.parent for path in out.glob("*/result.json"))
    if not done:
        raise fedray.UserError(f"there are no complete runs in {out}; first fedray sweep experiments/privacy.py.")
    rows = [audited(directory, images, samples) for directory in done]
    pd.DataFrame(rows).to_csv(out / "audits.csv", index=False)
    print_frame(table(rows))
    print(f"each run  {out / 'audits.csv'}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"privacy.py: {error}") from None

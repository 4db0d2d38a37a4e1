"""Is there an ε at which adapters tell nothing of the clients that trained them, and still draw what these taught them?

    python experiments/lora_privacy.py
    python experiments/lora_privacy.py --smoke        one round, two of the ε, few samples

The small Stable Diffusion that ships with fedray learns the digits 6 to 9 by LoRA from 100 clients of about seven
images each. As in privacy.py, their updates are clipped, and noise on their sum proves ε = 1, 4 or 8 at δ = 1e-3 for a
client, or there is none (∞). An adapter has fewer parameters than the U-Net of privacy.py, on which the same noise is
shorter. Beside the prompt accuracy and fd[digits] the table has what attacks find.

Twelve runs of 40 rounds: about 80 minutes on two cores, with the attacks.
"""

import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import tyro
from lora_digits import PRESET, photos
from privacy import CLIP, audited, table

import fedray
from fedray.cluster.connection import connected
from fedray.commands.terminal import print_frame, progress

CLIENTS, CANARIES, IMAGES = 100, 20, 174  # images of each digit: as many as there are
SCORES = ("accuracy[digits]", "fd[digits]")


def settings(out: Path, epsilon: float | None, seed: int, rounds: int) -> fedray.Config:
    """The run of one ε (None: no noise) and seed."""
    return replace(
        PRESET,
        task=replace(PRESET.task, train_data_dir=str(photos(out, seed, IMAGES))),
        clients=CLIENTS + CANARIES,
        canaries=CANARIES,
        partition=fedray.IID(),
        cohort=fedray.Poisson(0.3),
        wire=f"{CLIP},noise" if epsilon else f"{CLIP},noise:0",  # type: ignore[arg-type]
        target_epsilon=epsilon,
        delta=1e-3,
        rounds=rounds,
        validation_rounds=rounds,
        test_share=0.2,
        keep_optimizer=False,
        seed=seed,
    )


def main(
    seeds: tuple[int, ...] = (0, 1, 2),
    epsilons: tuple[float, ...] = (1.0, 4.0, 8.0),
    rounds: int = 40,
    out: Path | None = None,
    actors: int | None = None,
    smoke: bool = False,
) -> None:
    """Train with each ε, attack the adapters, and compare; runs that are in OUT already are not repeated.

    Args:
        seeds: a run of each ε for each.
        epsilons: beside ∞.
        rounds: communication rounds.
        out: directory of the runs; by default runs/lora-privacy-DATE-TIME.
        actors: client actors of a run; 0 trains in this process, without Ray.
        smoke: try it out, with one round, one ε beside ∞, one seed and few samples.
    """
    if smoke:
        rounds, seeds, epsilons = 1, seeds[:1], epsilons[-1:]
    out = out or Path("runs") / time.strftime("lora-privacy-%Y%m%d-%H%M%S")
    rows: list[dict[str, Any]] = []
    with nullcontext() if actors == 0 else connected(None):
        for epsilon in (*epsilons, None):
            for seed in seeds:
                config = replace(settings(out, epsilon, seed, rounds), actors=actors)
                config = replace(config, evaluate_samples=40, sampling_steps=2) if smoke else config
                directory = out / f"{epsilon or 'without'}-{seed}"
                with progress(config.rounds) as (_, show):
                    run = fedray.run(config, directory, resume=(directory / "config.json").exists(), show=show)
                assert run.result is not None
                row = audited(directory, *((20, 20) if smoke else ()))
                rows.append(row | {name: run.result["scores"][name]["value"] for name in SCORES})
    pd.DataFrame(rows).to_csv(out / "audits.csv", index=False)
    print_frame(table(rows))
    print(f"each run  {out / 'audits.csv'}")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"lora_privacy.py: {error}") from None

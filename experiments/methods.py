"""Which federated method is best on which split of the data, at equal rounds and at equal bytes?

    python experiments/methods.py                 tunes: six settings of each method, of which the best is chosen
    fedray sweep experiments/methods.py           compares what was chosen, over splits and seeds

Tuning takes ten rounds on Dir(0.1) with seed 10, which is not compared, and chooses by the held-out loss of the global
model: the same budget for every method. All clients train with plain SGD, which SCAFFOLD and FedNova need, at a
constant learning rate without clipping (at 0.2 some runs diverge). SCAFFOLD sends twice the bytes: at equal bytes, its
scores after 20 rounds stand beside those of the others after 40 (in results.parquet, by total.bytes).
"""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import tyro

import fedray
from fedray.cluster.trials import change
from fedray.vector.optimizer import Optimizer

RATES = (0.01, 0.02, 0.05, 0.08, 0.1, 0.15)
GRID = {  # six settings of each: its algorithm, and the clients' learning rate
    "fedavg": [("fedavg", rate) for rate in RATES],
    "fedavgm": [(f"fedavgm:1:{beta}", rate) for beta in (0.5, 0.9) for rate in (0.02, 0.05, 0.1)],
    "fedadam": [(f"fedadam:{step}", rate) for step in (0.003, 0.01, 0.03) for rate in (0.05, 0.1)],
    "fedyogi": [(f"fedyogi:{step}", rate) for step in (0.003, 0.01, 0.03) for rate in (0.05, 0.1)],
    "fedprox": [(f"fedprox:{mu}", rate) for mu in (0.01, 0.1) for rate in (0.02, 0.05, 0.1)],
    "scaffold": [("scaffold", rate) for rate in RATES],
    "fednova": [("fednova", rate) for rate in RATES],
}
TUNED = Path("runs/methods-tuning")

BASE = replace(
    fedray.PRESETS["digits"], optimizer=Optimizer("sgd"), lr_scheduler="constant", max_grad_norm=None,
    keep_optimizer=False, evaluate_every=20,
)  # fmt: skip
TUNING = replace(
    BASE, rounds=10, partition=fedray.Dirichlet(0.1), seed=10, held_out_share=0.1, validation_rounds=10,
    evaluate_samples=0, evaluate_every=None,
)  # fmt: skip


def form(algorithm: str) -> str:
    """Return an algorithm's short form as runs record it: without values that are defaults."""
    return change(BASE, "algorithm", algorithm).to_json()["algorithm"]


def chosen() -> dict[str, tuple[str, float]]:
    """Return the setting of each method: what tuning chose; before that the first at 0.05, which is not fair."""
    if (TUNED / "chosen.json").exists():
        return {method: tuple(setting) for method, setting in json.loads((TUNED / "chosen.json").read_text()).items()}
    print(f"methods.py: not tuned (there is no {TUNED}/chosen.json); every method at 0.05.", file=sys.stderr)
    return {method: next(each for each in settings if each[1] == 0.05) for method, settings in GRID.items()}


CHOSEN = chosen()
RATE = {form(algorithm): rate for algorithm, rate in CHOSEN.values()}
SPACE = {
    "partition": ["iid", "dirichlet:0.1", "by-label"],
    "algorithm": [algorithm for algorithm, _ in CHOSEN.values()],
    "learning_rate": lambda config: RATE[config.to_json()["algorithm"]],
    "seed": [0, 1, 2],
}
SMOKE = fedray.SMOKE | {"partition": ["dirichlet:0.1"], "seed": [0, 1]}


def held_out(config: fedray.Config, out: Path) -> float:
    """Train, or go on, and return the loss of the global model on what clients hold out; infinity where it diverges."""
    try:
        run = fedray.run(config, out, resume=(out / "config.json").exists())
    except fedray.RunError as error:
        print(f"{out.name}: {str(error).splitlines()[0]}")
        return math.inf
    assert run.result is not None
    return run.result["held_out"]["global"]


def main(smoke: bool = False, actors: int | None = None) -> None:
    """Train six settings of each method and choose the best; runs that are there already are not repeated.

    Args:
        smoke: try it out: one round, little data; nothing is chosen.
        actors: client actors of a run; 0 trains in this process, without Ray.
    """
    from fedray.cluster.connection import connected  # Ray takes seconds to import, and a sweep of this file need not

    base, out = replace(TUNING, actors=actors), TUNED
    if smoke:
        base, out = (
            replace(base, rounds=1, validation_rounds=1, test_share=0.8),
            TUNED.with_name("methods-tuning-smoke"),
        )
    found = {}
    with nullcontext() if actors == 0 else connected(None):
        for method, settings in GRID.items():
            losses = {}
            for algorithm, rate in settings:
                config = change(replace(base, learning_rate=rate), "algorithm", algorithm)
                losses[algorithm, rate] = held_out(config, out / f"{algorithm.replace(':', '-')}-{rate}")
            found[method] = min(losses, key=lambda setting: losses[setting])
            algorithm, rate = found[method]
            print(f"{method:9} {algorithm:15} learning rate {rate:g}: {losses[found[method]]:.4f}")
    if not smoke:
        (out / "chosen.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except fedray.UserError as error:
        raise SystemExit(f"methods.py: {error}") from None

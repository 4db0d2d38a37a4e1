"""A published shape: the CIFAR-10 benchmark of Apple's pfl-research, on generated images.

    python experiments/bench/shape.py [--flower PYTHON] [--pfl PYTHON]

1,000 clients of 50 images of 32x32 pixels, 50 clients a round, one epoch of batch 10, SGD at 0.1, a CNN of 1,626,442
parameters without dropout. fedray in one process and on two actors, checkpoint included (seconds from row to row),
against a plain loop on one thread: load the model, train, add the result up. The first round does not count. All but
Flower sample the same clients, and all train on the same images in orders of their own: the last rounds' losses must
agree. Flower (its simulation engine, two actors) and pfl (in one process, and in two by torchrun) write no checkpoint;
both keep network and images between clients.
"""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
import tyro
from measure import spread, table
from published import BATCH, CLIENTS, COHORT, RATE, cnn, generated, loss_of, train

import fedray
from fedray.cluster.connection import connected
from fedray.data.dataset import Dataset
from fedray.federation.plan import make_plan
from fedray.memory import keep_freed_memory
from fedray.vector import FlatParameters
from fedray.vector.optimizer import Optimizer

HERE = Path(__file__).parent
GOALS = {"fedray, one process": "1.02", "fedray, two actors": "0.55"}
Rounds = list[tuple[float, float]]  # seconds and training loss of each round but the first


class Learner:  # cannot sample, which nothing here asks for: so its task is no `Task` to a type checker
    def __init__(self) -> None:
        self.network = cnn()
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Any, rng: torch.Generator) -> torch.Tensor:
        return loss_of(self.network, batch["images"], batch["labels"])

    def save(self, directory: Path) -> None:
        directory.mkdir()


@dataclass(frozen=True)
class Shape:
    """The benchmark's data and network."""

    name: ClassVar[str] = "published-shape"

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        return Dataset(*generated())

    def build(self, device: torch.device) -> Learner:
        return Learner()


def config(cohort: int, rounds: int, actors: int = 0) -> fedray.Config:
    return fedray.Config(
        task=Shape(), clients=CLIENTS, fraction=cohort / CLIENTS, local_epochs=1, train_batch_size=BATCH,  # type: ignore[arg-type]
        evaluate_samples=0, optimizer=Optimizer("sgd"), learning_rate=RATE, max_grad_norm=None, rounds=rounds,
        actors=actors,
    )  # fmt: skip


def drawn(cohort: int, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw what fedray draws: the clients' shards [1000, 50], and the cohorts [rounds, cohort]."""
    settings = config(cohort, rounds)
    plan = make_plan(settings, settings.task.dataset())
    cohorts = [plan.round(settings, number, {"model": plan.initial}).cohort for number in range(rounds)]
    return np.stack([plan.shards[client] for client in range(CLIENTS)]), np.array(cohorts)


def by_fedray(cohort: int, rounds: int, actors: int) -> Rounds:
    with tempfile.TemporaryDirectory() as directory:
        rows = fedray.run(config(cohort, rounds, actors), Path(directory) / "run").rows
        return [(row["time"] - before["time"], row["loss"]) for before, row in zip(rows, rows[1:], strict=False)]


def by_loop(shards: np.ndarray, cohorts: np.ndarray) -> Iterator[tuple[float, float]]:
    """The same by a plain loop in this process."""
    torch.manual_seed(0)
    network = cnn()
    server = [parameter.detach().clone() for parameter in network.parameters()]
    for number, cohort in enumerate(cohorts):
        started = perf_counter()
        total, losses = [torch.zeros_like(each) for each in server], list[float]()
        for client in cohort:
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), server, strict=True):
                    parameter.copy_(value)
            losses += train(network, shards[client])
            for each, parameter in zip(total, network.parameters(), strict=True):
                each.add_(parameter.detach(), alpha=1 / len(cohort))
        server = total
        if number:
            yield perf_counter() - started, float(np.mean(losses))


def by_peer(python: Path, script: str, shards: np.ndarray, cohorts: np.ndarray, processes: int = 1) -> Rounds:
    """The same by a script of `peers`, in its own environment."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "shards.npz"
        np.savez(file, shards=shards, cohorts=cohorts)
        several = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [str(python), *several, str(HERE / "peers" / script), str(file), str(len(cohorts))]
        environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return [(seconds, loss) for seconds, loss in json.loads(done.stdout.splitlines()[-1])]


def main(
    rounds: int = 5, repeats: int = 2, cohort: int = COHORT, flower: Path | None = None, pfl: Path | None = None
) -> None:  # fmt: skip
    """Measure.

    Args:
        rounds: rounds of each measurement, of which the first is left out.
        repeats: how often each is measured, in turns.
        cohort: clients a round.
        flower: the Python of an environment with flwr[simulation] and torch; without it, Flower is left out.
        pfl: the Python of an environment with pfl and torch; without it, pfl is left out.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    shards, cohorts = drawn(cohort, rounds)
    sides: dict[str, Callable[[], Rounds]] = {
        "plain loop": lambda: list(by_loop(shards, cohorts)),
        "fedray, one process": lambda: by_fedray(cohort, rounds, 0),
        "fedray, two actors": lambda: by_fedray(cohort, rounds, 2),
    }
    if flower:
        sides["Flower, two actors"] = lambda: by_peer(flower, "flower_shape.py", shards, cohorts)
    if pfl:
        sides["pfl, one process"] = lambda: by_peer(pfl, "pfl_shape.py", shards, cohorts)
        sides["pfl, two processes"] = lambda: by_peer(pfl, "pfl_shape.py", shards, cohorts, 2)
    found: dict[str, Rounds] = {name: [] for name in sides}
    with connected(None):
        for _ in range(repeats):
            for name, clock in sides.items():
                found[name] += clock()
    losses = [times[-1][1] for times in found.values()]
    assert max(losses) < 1.1 * min(losses) + 0.05, losses
    plain = [seconds for seconds, _ in found["plain loop"]]
    rows = []
    for name, times in found.items():
        seconds = [each for each, _ in times]
        ratios = [ours / theirs for ours, theirs in zip(seconds, plain, strict=True)]
        rows.append([name, spread(seconds), spread(ratios), f"{times[-1][1]:.3f}", GOALS.get(name, "")])
    rows += [[name, "not installed", "–", "–", ""] for name, python in (("Flower", flower), ("pfl", pfl)) if not python]
    table(["", "seconds a round", "÷ plain loop", "last loss", "goal"], rows)


if __name__ == "__main__":
    tyro.cli(main)

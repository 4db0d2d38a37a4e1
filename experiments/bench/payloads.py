"""What does a round cost beyond training? Clients that only add one to every weight: all that is left is messages.

    python experiments/bench/payloads.py [--flower /path/to/an/environment/with/flwr/bin/python]

Four clients of 433.6 MiB, twenty of 40 MB, a hundred of 1 MB, on two actors. fedray writes a durable checkpoint after
each round, beside the next one; a round's seconds are those between two rows. Flower (its simulation engine, FedAvg)
writes nothing; its clients are handed arrays and add to them with NumPy. The two alternate. The floor is what a round
must move through memory at least, (3 C + 1) times the model, at the speed of a copy in the same process.
"""

import json
import statistics
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import tyro
from measure import spread, table
from torch import nn

import fedray
from fedray.algorithms import Algorithm, Local, Tensors
from fedray.cluster.connection import connected
from fedray.data.dataset import Dataset
from fedray.vector import FlatParameters
from fedray.vector.optimizer import Optimizer

SHAPES = {"4 x 433.6 MiB": (4, 113_666_000), "20 x 40 MB": (20, 10_000_000), "100 x 1 MB": (100, 250_000)}
GOALS = dict(zip(SHAPES, ("7", "4.5", "10"), strict=True))
LAYERS = 400  # arrays of a model, as a U-Net has


class Learner:  # cannot sample, which nothing here asks for: so its task is no `Task` to a type checker
    def __init__(self, size: int) -> None:
        self.network = nn.ParameterList([nn.Parameter(torch.zeros(size // LAYERS)) for _ in range(LAYERS)])
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Any, rng: torch.Generator) -> torch.Tensor:
        return self.flat.vector[0] * 0.0

    def save(self, directory: Path) -> None:
        directory.mkdir()


@dataclass(frozen=True)
class Payload:
    """A model of so many weights, and an example for each client."""

    name: ClassVar[str] = "payload"
    clients: int
    size: int

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        return Dataset(np.zeros((self.clients, 1, 2, 2), np.uint8))

    def build(self, device: torch.device) -> Learner:
        return Learner(self.size)


@dataclass(frozen=True)
class AddOne(Algorithm):
    """Clients that add one to every weight, in place of training."""

    def train(self, local: Local, down: Tensors, memory: Tensors) -> None:
        local.weights.add_(1.0)
        local.batches = 1  # type: ignore[attr-defined]


def time_fedray(clients: int, size: int, rounds: int) -> list[float]:
    """Seconds of each round but the first, from row to row."""
    config = fedray.Config(
        task=Payload(clients, size), algorithm=AddOne(), clients=clients, rounds=rounds, local_steps=1,  # type: ignore[arg-type]
        train_batch_size=1, evaluate_samples=0, actors=2, optimizer=Optimizer("sgd"),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        run = fedray.run(config, Path(directory) / "run")
        times = [row["time"] for row in run.rows]
        model = run.state(Learner(size).flat.layout)
        assert model is not None
        assert (model.tensors["model"] == rounds).all()
        return [after - before for before, after in zip(times, times[1:], strict=False)]


def time_flower(python: Path, clients: int, size: int, rounds: int) -> list[float]:
    """Seconds of each round but the first of Flower's simulation, in its own environment."""
    script = Path(__file__).parent / "peers" / "flower_payloads.py"
    command = [str(python), str(script), *map(str, (clients, size, LAYERS, rounds))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def floor(clients: int, size: int) -> float:
    """Seconds for (3 C + 1) copies of the model."""
    a, b = torch.zeros(size), torch.zeros(size)
    started = time.perf_counter()
    for _ in range(3 * clients + 1):
        b.copy_(a)
    return time.perf_counter() - started


def main(rounds: int = 6, repeats: int = 3, flower: Path | None = None, only: str = "") -> None:
    """Measure.

    Args:
        rounds: rounds of each measurement, of which the first is left out.
        repeats: how often each is measured, in turns.
        flower: the Python of an environment with flwr[simulation]; without it, fedray alone is measured.
        only: measure shapes whose name contains this.
    """
    torch.set_num_threads(1)
    shapes = {name: shape for name, shape in SHAPES.items() if only in name}
    found: dict[tuple[str, str], list[float]] = {}
    with connected(None):
        for repeat in range(repeats):
            for name, (clients, size) in shapes.items():
                sides = {"fedray": lambda c=clients, s=size: time_fedray(c, s, rounds)}
                if flower:
                    sides["Flower"] = lambda c=clients, s=size: time_flower(flower, c, s, rounds)
                for side, clock in sides.items():
                    times = clock()
                    found.setdefault((name, side), []).extend(times)
                    print(
                        f"{repeat + 1}/{repeats} {name}, {side}: {statistics.median(times):.3f} s a round", flush=True
                    )
                found.setdefault((name, "floor"), []).append(floor(clients, size))
    rows = []
    for name in shapes:
        ours, theirs = statistics.median(found[name, "fedray"]), found.get((name, "Flower"))
        ratio = f"{statistics.median(theirs) / ours:.1f}" if theirs else "–"
        flowers = spread(theirs) if theirs else "not installed"
        rows.append([name, spread(found[name, "floor"]), flowers, spread(found[name, "fedray"]), ratio, GOALS[name]])
    table(["clients x bytes", "floor, s", "Flower, s a round", "fedray, s a round", "ratio", "goal"], rows)


if __name__ == "__main__":
    tyro.cli(main)

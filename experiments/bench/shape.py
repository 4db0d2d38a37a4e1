"""A published shape: the CIFAR-10 benchmark of Apple's pfl-research, on generated images.

    python experiments/bench/shape.py

1,000 clients of 50 images of 32x32 pixels, 50 clients a round, one epoch of batch 10, SGD at 0.1, a CNN of 1,626,442
parameters without dropout. fedray in one process and on two actors, checkpoint included (seconds from row to row),
against a plain loop on one thread: load the model, train, add the result up. The first round does not count. All sample
the same clients, and train on the same images in orders of their own: the last rounds' losses must agree.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from measure import spread, table
from torch import nn

import fedray
from fedray.cluster.connection import connected
from fedray.data.dataset import Dataset
from fedray.federation.plan import make_plan
from fedray.memory import keep_freed_memory
from fedray.vector import FlatParameters
from fedray.vector.optimizer import Optimizer

CLIENTS, IMAGES, COHORT, BATCH, RATE = 1000, 50, 50, 10, 0.1
GOALS = {"fedray, one process": "1.02", "fedray, two actors": "0.55"}


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(64 * 14 * 14, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip


def generated() -> Dataset:
    """Ten classes, each a picture with noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(CLIENTS * IMAGES) % 10
    pictures = rng.integers(64, 192, (10, 3, 32, 32))
    images = pictures[labels] + rng.integers(-64, 64, (len(labels), 3, 32, 32))
    return Dataset(images.astype(np.uint8), labels)


class Learner:  # cannot sample, which nothing here asks for: so its task is no `Task` to a type checker
    def __init__(self) -> None:
        self.network = cnn()
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Any, rng: torch.Generator) -> torch.Tensor:
        return F.cross_entropy(self.network(batch["images"].float() / 255), batch["labels"])

    def save(self, directory: Path) -> None:
        directory.mkdir()


@dataclass(frozen=True)
class Shape:
    """The benchmark's data and network."""

    name: ClassVar[str] = "published-shape"

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        return generated()

    def build(self, device: torch.device) -> Learner:
        return Learner()


CONFIG = fedray.Config(
    task=Shape(), clients=CLIENTS, fraction=COHORT / CLIENTS, local_epochs=1, train_batch_size=BATCH,  # type: ignore[arg-type]
    evaluate_samples=0, optimizer=Optimizer("sgd"), learning_rate=RATE, max_grad_norm=None,
)  # fmt: skip


def by_fedray(actors: int, rounds: int) -> Iterator[tuple[float, float]]:
    """Seconds and training loss of each round but the first."""
    with tempfile.TemporaryDirectory() as directory:
        run = fedray.run(replace(CONFIG, rounds=rounds, actors=actors), Path(directory) / "run")
        for before, row in zip(run.rows, run.rows[1:], strict=False):
            yield row["time"] - before["time"], row["loss"]


def by_loop(rounds: int) -> Iterator[tuple[float, float]]:
    """The same by a plain loop in this process."""
    dataset = generated()
    plan = make_plan(CONFIG, dataset)
    assert dataset.labels is not None
    torch.manual_seed(0)
    network = cnn()
    server = [parameter.detach().clone() for parameter in network.parameters()]
    for number in range(rounds):
        cohort = plan.round(CONFIG, number, {"model": plan.initial}).cohort
        started = perf_counter()
        total, losses = [torch.zeros_like(each) for each in server], []
        for client in cohort:
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), server, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.SGD(network.parameters(), RATE, fused=True)
            shard = plan.shards[client]
            for indices in torch.randperm(len(shard)).split(BATCH):
                chosen = shard[indices.numpy()]
                images = torch.from_numpy(dataset.images[chosen]).float() / 255
                loss = F.cross_entropy(network(images), torch.from_numpy(dataset.labels[chosen]))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            for each, parameter in zip(total, network.parameters(), strict=True):
                each.add_(parameter.detach(), alpha=1 / len(cohort))
        server = total
        if number:
            yield perf_counter() - started, float(np.mean(losses))


def main(rounds: int = 8) -> None:
    """Measure.

    Args:
        rounds: rounds of each, of which the first is left out.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    with connected(None):
        found = {
            "plain loop": list(by_loop(rounds)),
            "fedray, one process": list(by_fedray(0, rounds)),
            "fedray, two actors": list(by_fedray(2, rounds)),
        }
    losses = [times[-1][1] for times in found.values()]
    assert max(losses) < 1.1 * min(losses) + 0.05, losses
    plain = [seconds for seconds, _ in found["plain loop"]]
    rows = []
    for name, times in found.items():
        seconds = [each for each, _ in times]
        ratios = [ours / theirs for ours, theirs in zip(seconds, plain, strict=True)]
        rows.append([name, spread(seconds), spread(ratios), f"{times[-1][1]:.3f}", GOALS.get(name, "")])
    table(["", "seconds a round", "÷ plain loop", "last loss", "goal"], rows)


if __name__ == "__main__":
    tyro.cli(main)

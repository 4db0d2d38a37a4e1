"""What does a tiny client cost in a large federation? Models of 4 and 31 kB on two actors, cohorts of up to 10,000.

    python experiments/bench/cohorts.py

Every client holds one example and makes one step of SGD. Milliseconds a client: from row to row, checkpoint
included, without the first round, against the loop that one would write in two bare processes at once. Seconds to
start: from `fedray.run` to the first row, less one later round. The last row is the shape of FLUTE's comparison
(Garcia et al. 2022, arXiv:2203.13789): logistic regression on images as large as MNIST's, generated, 1,000 clients of
60, 10 a round, one epoch of batch 10, 100 rounds.
"""

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from measure import spread, table
from torch import nn

import fedray
from fedray.cluster.connection import connected
from fedray.data.dataset import Dataset
from fedray.vector import FlatParameters
from fedray.vector.optimizer import Optimizer

RATE = 0.1


class Learner:  # cannot sample, which nothing here asks for: so its task is no `Task` to a type checker
    def __init__(self, inputs: int = 100, bias: bool = False) -> None:
        self.network = nn.Linear(inputs, 10, bias=bias)
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Any, rng: torch.Generator) -> torch.Tensor:
        return F.cross_entropy(self.network(batch["images"].flatten(1).float() / 255), batch["labels"])

    def save(self, directory: Path) -> None:
        directory.mkdir()


@dataclass(frozen=True)
class Tiny:
    """A linear model of square images: by default 1,000 parameters, one image of 10x10 for each client."""

    name: ClassVar[str] = "tiny-cohorts"
    clients: int
    side: int = 10
    images: int = 1
    """Of a client."""
    bias: bool = False

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        rng, n = np.random.default_rng(0), self.clients * self.images
        images = rng.integers(0, 256, (n, 1, self.side, self.side), dtype=np.uint8)
        return Dataset(images, np.arange(n) % 10)

    def build(self, device: torch.device) -> Learner:
        return Learner(self.side**2, self.bias)


class Case(NamedTuple):
    """A federation, how many take part in a round, and how many rounds are measured (None: as many as is asked for)."""

    task: Tiny
    cohort: int
    batch: int = 1
    rate: float = RATE
    rounds: int | None = None

    def __str__(self) -> str:
        return f"{self.cohort:,} of {self.task.clients:,}"


FLUTE = Case(Tiny(1000, side=28, images=60, bias=True), 10, batch=10, rate=0.03, rounds=100)


def time_fedray(case: Case, rounds: int) -> tuple[list[float], float]:
    """Seconds of each round but the first, and seconds to start."""
    config = fedray.Config(
        task=case.task, clients=case.task.clients, fraction=case.cohort / case.task.clients, rounds=rounds,  # type: ignore[arg-type]
        local_epochs=1, train_batch_size=case.batch, evaluate_samples=0, actors=2, optimizer=Optimizer("sgd"),
        learning_rate=case.rate,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        began = time.time()
        run = fedray.run(config, Path(directory) / "run")
        ends = [row["time"] for row in run.rows]
        times = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        return times, ends[0] - began - statistics.median(times)


def bare(case: Case, together: Any, seconds: Any) -> None:
    """One of two processes: load the model, one epoch, add the result up, for half of a cohort."""
    torch.set_num_threads(1)
    clients, task = case.cohort // 2, case.task
    dataset, network = replace(task, clients=2 * clients).dataset(), nn.Linear(task.side**2, 10, bias=task.bias)
    assert dataset.labels is not None
    initial = [parameter.detach().clone() for parameter in network.parameters()]
    total = [torch.zeros_like(parameter) for parameter in initial]
    for repeat in range(2):
        together.wait()
        started = time.perf_counter()
        for client in range(clients):
            with torch.no_grad():
                for parameter, value in zip(network.parameters(), initial, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.SGD(network.parameters(), case.rate, fused=True)
            for indices in torch.randperm(task.images).add(client * task.images).split(case.batch):
                chosen = indices.numpy()
                images = torch.from_numpy(dataset.images[chosen]).flatten(1).float() / 255
                loss = F.cross_entropy(network(images), torch.from_numpy(dataset.labels[chosen]))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                loss.item()
            for added, parameter in zip(total, network.parameters(), strict=True):
                added.add_(parameter.detach(), alpha=1 / clients)
        together.wait()
        if repeat:
            seconds.put(time.perf_counter() - started)


def time_bare(case: Case) -> float:
    """Seconds of two bare processes for half of a cohort each, after a first time that does not count."""
    spawn = multiprocessing.get_context("spawn")
    together, seconds = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=bare, args=(case, together, seconds)) for _ in range(2)]
    for process in processes:
        process.start()
    times = [seconds.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return max(times)


def main(rounds: int = 6, repeats: int = 3, most: int = 1_000_000, longest: int = 100) -> None:
    """Measure.

    Args:
        rounds: rounds in each measurement, of which the first is left out.
        repeats: how often each is measured, in turns.
        most: leave out federations of more clients.
        longest: rounds of the last row at most.
    """
    sizes = [(1000, 100), (1000, 1000), (1_000_000, 100), (1_000_000, 1000), (1_000_000, 10_000)]
    cases = [Case(Tiny(clients), cohort) for clients, cohort in sizes if clients <= most] + [FLUTE]
    ours: dict[Case, list[float]] = {case: [] for case in cases}
    theirs: dict[Case, list[float]] = {case: [] for case in cases}
    starts: dict[Case, list[float]] = {case: [] for case in cases}
    with connected(None):
        for _ in range(repeats):
            for case in cases:
                times, start = time_fedray(case, min(case.rounds or rounds, longest))
                ours[case].append(statistics.median(times) / case.cohort * 1e3)
                theirs[case].append(time_bare(case) / case.cohort * 1e3)
                starts[case].append(start)
    rows = []
    for case in cases:
        ratios = [a / b for a, b in zip(ours[case], theirs[case], strict=True)]
        cells = [spread(theirs[case]), spread(ours[case]), spread(ratios), spread(starts[case], 1)]
        rows.append([f"{case}{', FLUTE' if case is FLUTE else ''}", *cells])
    table(["cohort", "two bare loops, ms a client", "fedray, two actors", "ratio", "start, s"], rows)


if __name__ == "__main__":
    tyro.cli(main)

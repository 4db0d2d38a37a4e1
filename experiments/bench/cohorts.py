"""What does a tiny client cost in a large federation? A model of 4 kB on two actors, cohorts of up to 10,000.

    python experiments/bench/cohorts.py

Every client holds one example and makes one step of SGD. Milliseconds a client: from row to row, checkpoint
included, without the first round, against the loop that one would write in two bare processes at once. Seconds to
start: from `fedray.run` to the first row, less one later round.
"""

import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
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
from fedray.vector import FlatParameters
from fedray.vector.optimizer import Optimizer

RATE = 0.1


class Learner:  # cannot sample, which nothing here asks for: so its task is no `Task` to a type checker
    def __init__(self) -> None:
        self.network = nn.Linear(100, 10, bias=False)
        self.flat = FlatParameters(self.network)

    def prepare(self, dataset: Dataset, indices: np.ndarray, mirrored: bool) -> None:
        pass

    def loss(self, batch: Any, rng: torch.Generator) -> torch.Tensor:
        return F.cross_entropy(self.network(batch["images"].flatten(1).float() / 255), batch["labels"])

    def save(self, directory: Path) -> None:
        directory.mkdir()


@dataclass(frozen=True)
class Tiny:
    """1,000 parameters, one image of 10x10 for each client."""

    name: ClassVar[str] = "tiny-cohorts"
    clients: int

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (self.clients, 1, 10, 10), dtype=np.uint8)
        return Dataset(images, np.arange(self.clients) % 10)

    def build(self, device: torch.device) -> Learner:
        return Learner()


def time_fedray(clients: int, cohort: int, rounds: int) -> tuple[list[float], float]:
    """Seconds of each round but the first, and seconds to start."""
    config = fedray.Config(
        task=Tiny(clients), clients=clients, fraction=cohort / clients, rounds=rounds, local_steps=1,  # type: ignore[arg-type]
        train_batch_size=1, evaluate_samples=0, actors=2, optimizer=Optimizer("sgd"), learning_rate=RATE,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        began = time.time()
        run = fedray.run(config, Path(directory) / "run")
        ends = [row["time"] for row in run.rows]
        times = [after - before for before, after in zip(ends, ends[1:], strict=False)]
        return times, ends[0] - began - statistics.median(times)


def bare(clients: int, together: Any, seconds: Any) -> None:
    """One of two processes: load the model, one step, add the result up, for half of a cohort."""
    torch.set_num_threads(1)
    dataset, network = Tiny(2 * clients).dataset(), nn.Linear(100, 10, bias=False)
    assert dataset.labels is not None
    initial = network.weight.detach().clone()
    total = torch.zeros_like(initial)
    for repeat in range(2):
        together.wait()
        started = time.perf_counter()
        for client in range(clients):
            with torch.no_grad():
                network.weight.copy_(initial)
            optimizer = torch.optim.SGD(network.parameters(), RATE, fused=True)
            image = torch.from_numpy(dataset.images[client : client + 1]).flatten(1).float() / 255
            loss = F.cross_entropy(network(image), torch.from_numpy(dataset.labels[client : client + 1]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            total.add_(network.weight.detach(), alpha=1 / clients)
        together.wait()
        if repeat:
            seconds.put(time.perf_counter() - started)


def time_bare(cohort: int) -> float:
    """Seconds of two bare processes for half of a cohort each, after a first time that does not count."""
    spawn = multiprocessing.get_context("spawn")
    together, seconds = spawn.Barrier(2), spawn.Queue()
    processes = [spawn.Process(target=bare, args=(cohort // 2, together, seconds)) for _ in range(2)]
    for process in processes:
        process.start()
    times = [seconds.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return max(times)


def main(rounds: int = 6, repeats: int = 3, most: int = 1_000_000) -> None:
    """Measure.

    Args:
        rounds: rounds in each measurement, of which the first is left out.
        repeats: how often each is measured, in turns.
        most: leave out federations of more clients.
    """
    cases = [(1000, 100), (1000, 1000), (1_000_000, 100), (1_000_000, 1000), (1_000_000, 10_000)]
    cases = [case for case in cases if case[0] <= most]
    ours: dict[Any, list[float]] = {case: [] for case in cases}
    theirs: dict[Any, list[float]] = {case: [] for case in cases}
    starts: dict[Any, list[float]] = {case: [] for case in cases}
    with connected(None):
        for _ in range(repeats):
            for clients, cohort in cases:
                times, start = time_fedray(clients, cohort, rounds)
                ours[clients, cohort].append(statistics.median(times) / cohort * 1e3)
                theirs[clients, cohort].append(time_bare(cohort) / cohort * 1e3)
                starts[clients, cohort].append(start)
    rows = []
    for case in cases:
        ratios = [a / b for a, b in zip(ours[case], theirs[case], strict=True)]
        cells = [spread(theirs[case]), spread(ours[case]), spread(ratios), spread(starts[case], 1)]
        rows.append([f"{case[1]:,} of {case[0]:,}", *cells])
    table(["cohort", "two bare loops, ms a client", "fedray, two actors", "ratio", "start, s"], rows)


if __name__ == "__main__":
    tyro.cli(main)

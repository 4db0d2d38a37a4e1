"""What memory do an actor and the driver hold, beside Ray's? At the size of the paper's U-Net.

    python experiments/bench/memory.py

113,673,219 parameters (455 MB), one step of AdamW on one image a client, FedAvg without an average, two rounds, one
actor. The peaks of private memory of the actor and of the driver's process, whole and divided by the model's size. What
they hold without a model, imports above all, is in the first rows, of a network of 0.6 MB; a column leaves it out.
Memory that is shared, Ray's object store, is stated apart, by the part that the process counts for. A block is what an
actor trains before its sum travels: one client where clients take a second each; more where they take less, which is
had by asking for longer blocks.
"""

import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import tyro
from measure import Peak, actors_of, table

import fedray
from fedray.cluster.connection import connected
from fedray.data.dataset import Dataset
from fedray.federation import blocks
from fedray.tasks.ddpm import DDPM
from fedray.vector.optimizer import Optimizer


@dataclass(frozen=True)
class Faces(DDPM):
    """A network on generated images, one for each client."""

    name: ClassVar[str] = "generated-faces"
    clients: int = 2
    block: float = blocks.SECONDS
    """Seconds of training in a block."""

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        blocks.SECONDS = self.block  # in the driver's process, which loads the data before it makes blocks
        shape = (self.clients, self.channels, self.resolution, self.resolution)
        return Dataset(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


class Case(NamedTuple):
    """A preset's network, a cohort, seconds in a block, and the goals: private memory ÷ the model's size."""

    preset: str
    cohort: int
    block: float
    goals: dict[str, str]


PROCESSES = {"actor": "ClientActor", "driver": "DriverActor"}
CASES = {
    "no model to speak of": Case("digits", 2, 0.0, {}),
    "2 clients, a block is one": Case("celeba", 2, 0.0, {"actor": "5", "driver": "4.5"}),
    "8 clients, a block is one": Case("celeba", 8, 0.0, {"actor": "5", "driver": "4.5"}),
    "8 clients, blocks of up to 4": Case("celeba", 8, 1e6, {"actor": "7", "driver": "4.5"}),
}


def measure(case: Case) -> tuple[dict[str, tuple[int, int]], int]:
    """Return peaks of private memory, and of the object store's part, in bytes by process; and the model's bytes."""
    preset = fedray.PRESETS[case.preset].task
    shape = {field.name: getattr(preset, field.name) for field in fields(DDPM)}
    config = fedray.Config(
        task=Faces(**shape, clients=case.cohort, block=case.block), clients=case.cohort, rounds=2, local_steps=1,
        train_batch_size=1, evaluate_samples=0, actors=1, optimizer=Optimizer(),
    )  # fmt: skip
    owners: dict[int, str] = {}

    def pids() -> list[int]:
        owners.update({pid: name for name, kind in PROCESSES.items() for pid in actors_of(kind)})
        return list(owners)

    with tempfile.TemporaryDirectory() as directory, Peak(pids) as peak:
        size = fedray.run(config, Path(directory) / "run").rows[0]["clients"][0]["bytes_up"]
    assert sorted(owners.values()) == sorted(PROCESSES)
    return {name: (peak.private[pid], peak.shared[pid]) for pid, name in owners.items()}, size


def main(large: bool = True) -> None:
    """Measure.

    Args:
        large: the paper's U-Net, not the small one alone (6 GB of memory, some minutes).
    """
    rows, without = [], dict[str, int]()
    with connected(None):
        for what, case in CASES.items():
            if not large and case.goals:
                continue
            found, size = measure(case)
            for name, (private, shared) in sorted(found.items()):
                ratios = ["–", "–", ""]
                if case.goals:
                    ratios = [f"{private / size:.2f}", f"{(private - without[name]) / size:.2f}", case.goals[name]]
                else:
                    without[name] = private
                rows.append([f"{what}: {name}", f"{private / 1e9:.2f}", *ratios, f"{shared / 1e9:.2f}"])
    table(["", "private memory, GB", "÷ model", "beyond the first rows", "goal", "object store, GB"], rows)


if __name__ == "__main__":
    tyro.cli(main)

"""Client actors: processes that do jobs, and their share of the machine."""

import os
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from fedray.cluster.logs import Printed, printed, stderr_file
from fedray.cluster.messages import Message, pack
from fedray.cluster.nodes import SHORT
from fedray.config import Config
from fedray.data.dataset import Source
from fedray.federation.worker import Done, Shared, Work, Worker, do
from fedray.memory import keep_freed_memory
from fedray.record.run import Row


class Place(NamedTuple):
    """Where an actor is."""

    node: str
    log: str  # the file of its stderr, if that is known


class ClientActor:
    """A process that has a fraction of the machine and does one job at a time."""

    def __init__(self, config: Config, index: int, source: Source | None, sha256: str | None, run: str) -> None:
        keep_freed_memory()
        keep_to_fraction(config)
        self.index = index
        self.run = run
        self.renew(config, source, sha256)

    def __repr__(self) -> str:
        """Name it in Ray's dashboard."""
        return f"fedray client actor {self.index}" + (f" of {self.run}" if self.run else "")

    def renew(self, config: Config, source: Source | None, sha256: str | None) -> None:
        """Do jobs of another run from now on, with the same share of the machine."""
        device = torch.device("cuda" if config.gpus_per_actor else "cpu")
        self.worker = Worker(config, device, f"actor {self.index}", source, sha256)
        self.worker.node = ray.get_runtime_context().get_node_id()[:SHORT]

    def place(self) -> Place:
        return Place(ray.get_runtime_context().get_node_id(), stderr_file())

    @ray.method(num_returns=2)
    def do(self, work: Work, job: Any, about: Any, names: tuple[str, ...], *arrays: np.ndarray) -> tuple[Row, Message]:
        row, payload = do(self.worker, work, Shared(dict(zip(names, arrays, strict=True)), about), job)
        return row, pack(payload)

    @ray.method(concurrency_group="progress")
    def progress(self, read: tuple[int, int]) -> tuple[Done, Printed]:
        """Return what it has done, and what it has printed since its files were read so far."""
        return self.worker.done, printed(stderr_file(), read)


def keep_to_fraction(config: Config) -> None:
    """Hold this process to its share of a GPU's memory: the fraction that Ray counts is bookkeeping only."""
    if not config.gpus_per_actor:
        hide_gpus()
    if 0 < config.gpus_per_actor < 1:
        torch.cuda.set_per_process_memory_fraction(config.gpus_per_actor)


def make_options(cpus: float, gpus: float) -> dict[str, Any]:
    """Make the options of an actor with that share of the machine."""
    # No restarts: Ray's own lose the actor's state and may run a call twice.
    return {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0}


def hide_gpus() -> None:
    """Hide GPUs from this process, which asked for none: Ray no longer does.

    Not by Ray's `runtime_env`: actors that this one starts would inherit it.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

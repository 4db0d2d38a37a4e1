"""Client actors: processes that do jobs, and their share of the machine."""

import os
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedray.cluster.logs import Printed, printed, stderr_file
from fedray.cluster.messages import Message, pack, unpack
from fedray.cluster.nodes import SHORT
from fedray.config import Config
from fedray.data.dataset import Source
from fedray.federation.worker import Done, Parts, Shared, Work, Worker, device_of, do
from fedray.memory import keep_freed_memory
from fedray.record.provenance import versions
from fedray.record.run import Row


class Place(NamedTuple):
    """Where an actor is."""

    node: str
    log: str  # the file of its stderr, if that is known
    versions: dict[str, str]  # of what its process has installed


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
        self.worker = Worker(config, device_of(config), f"actor {self.index}", source, sha256)
        self.worker.node = ray.get_runtime_context().get_node_id()[:SHORT]

    def place(self) -> Place:
        return Place(ray.get_runtime_context().get_node_id(), stderr_file(), versions())

    @ray.method(num_returns=3)
    def do(
        self, work: Work, job: Any, shared: Shared, onto: Message | None, names: tuple[str, ...], *arrays: np.ndarray
    ) -> tuple[Row, Message, Message]:
        """Do a job: return its row, its payload, and apart from that its partial, merged with `onto`.

        Args:
            shared: without its arrays, which follow, with their names.
        """
        shared = shared._replace(arrays=dict(zip(names, arrays, strict=True)))
        row, payload = do(self.worker, work if onto is None else partial(_go_on, work, onto), shared, job)
        if not isinstance(payload, Parts):
            return row, pack(payload), pack(None)
        return row, pack(payload._replace(partial=None)), pack(payload.partial)

    def merge(self, shared: Shared, *partials: Message) -> Message:
        """Make one partial of several."""
        assert shared.merge is not None
        return pack(shared.merge(self.worker, shared, None, *map(unpack, partials)))

    @ray.method(concurrency_group="progress")
    def progress(self, read: tuple[int, int]) -> tuple[Done, Printed]:
        """Return what it has done, and what it has printed since its files were read so far."""
        return self.worker.done, printed(stderr_file(), read)


def _go_on(work: Work, onto: Message, worker: Worker, shared: Shared, job: Any) -> tuple[Row, Any]:
    """Do work whose partial goes on with one that an earlier job has left."""
    row, payload = work(worker, shared, job)
    if isinstance(payload, Parts):
        assert shared.merge is not None
        payload = payload._replace(partial=shared.merge(worker, shared, payload.partial, unpack(onto)))
    return row, payload


def keep_to_fraction(config: Config) -> None:
    """Hold this process to its share of a GPU's memory: the fraction that Ray counts is bookkeeping only."""
    if not config.gpus_per_actor:
        hide_gpus()
    if 0 < config.gpus_per_actor < 1 and device_of(config).type == "cuda":
        torch.cuda.set_per_process_memory_fraction(config.gpus_per_actor)


def make_options(cpus: float, gpus: float, node: str = "", label: str | None = None) -> dict[str, Any]:
    """Make the options of an actor with that share of the machine; on that node, or elsewhere if it is full by then."""
    # No restarts: Ray's own lose the actor's state and may run a call twice.
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": 0}
    if node:
        there = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        options["scheduling_strategy"] = there
    if label is not None:
        options["label_selector"] = dict([label.split("=", 1)])
    return options


def hide_gpus() -> None:
    """Hide GPUs from this process, which asked for none: Ray no longer does.

    Not by Ray's `runtime_env`: actors that this one starts would inherit it.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

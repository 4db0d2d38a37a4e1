"""Client actors: processes that do jobs, their share of the machine, and how many of them fit."""

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, RayError

from fedray.cluster.messages import Message, pack
from fedray.config import Config
from fedray.data.dataset import Source
from fedray.errors import UserError
from fedray.federation.worker import Done, Shared, Work, Worker, do
from fedray.record.run import Row

START_TIMEOUT = 180.0  # seconds for actors to start: each imports torch, and a cold disk serves them sequentially

ENDED = "its process ended (killed, or out of memory)"


class ClientActor:
    """A process that has a fraction of the machine and does one job at a time."""

    def __init__(self, config: Config, index: int, source: Source | None, sha256: str | None) -> None:
        keep_to_fraction(config)
        self.index = index
        self.renew(config, source, sha256)

    def renew(self, config: Config, source: Source | None, sha256: str | None) -> None:
        """Do jobs of another run from now on, with the same share of the machine."""
        device = torch.device("cuda" if config.gpus_per_actor else "cpu")
        self.worker = Worker(config, device, f"actor {self.index}", source, sha256)

    @ray.method(num_returns=2)
    def do(self, work: Work, job: Any, about: Any, names: tuple[str, ...], *arrays: np.ndarray) -> tuple[Row, Message]:
        row, payload = do(self.worker, work, Shared(dict(zip(names, arrays, strict=True)), about), job)
        return row, pack(payload)

    @ray.method(concurrency_group="progress")
    def progress(self) -> Done:
        return self.worker.done


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


def count_actors(config: Config) -> int:
    """Count the client actors of a run: as many as asked for, else as many as fit; never more than the cohort.

    Raises:
        UserError: the cluster has no GPU, or is too small.
    """
    slots = count_slots(config)
    return min(config.actors or slots, config.cohort_size)


def count_slots(config: Config) -> int:
    """Count the client actors that fit into the cluster.

    Raises:
        UserError: fewer fit than asked for, or none.
    """
    have = ray.cluster_resources()
    gpus, cpus = have.get("GPU", 0), have.get("CPU", 0)
    if config.gpus_per_actor and not gpus:
        raise UserError(f"--gpus-per-actor {config.gpus_per_actor:g}: this machine (or cluster) has no GPU.")
    fit_cpu = math.floor(cpus / config.cpus_per_actor + 1e-9)
    fit_gpu = gpus * math.floor(1 / config.gpus_per_actor + 1e-9) if 0 < config.gpus_per_actor < 1 else math.inf
    if config.gpus_per_actor >= 1:
        fit_gpu = gpus // config.gpus_per_actor
    slots = int(min(fit_cpu, fit_gpu))
    wanted = config.actors or 1
    if wanted > slots:
        raise UserError(
            f"--actors {wanted} needs {describe_need(config, wanted)}, and there are {describe(have)}: at most {slots} "
            f"fit. Ask for fewer, or lower --cpus-per-actor or --gpus-per-actor."
        )
    return slots


def describe_need(config: Config, count: int) -> str:
    """Describe what that many client actors need."""
    gpus = f" and {count * config.gpus_per_actor:g} GPUs" if config.gpus_per_actor else ""
    return f"{count * config.cpus_per_actor:g} CPUs{gpus}"


def describe(have: Mapping[str, float]) -> str:
    """Describe CPUs and GPUs in words."""
    return f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"


def explain(error: RayError) -> str:
    """Pick the line of a Ray error that gives its cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, ActorDiedError) and "creation" not in str(error):
        return ENDED
    return lines[-1].rstrip(".") if lines else type(error).__name__

"""What does the engine add to a client? In one process, on one thread, against the loop that one would write.

    python experiments/bench/clients.py

A tiny client: a model of 4 kB, one step on 8 images, 1,000 clients a round. A large one: the paper's U-Net
(113,673,219 parameters), one step on one image. Both are whole rounds: down, training, upload, check, sum.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from cohorts import Learner
from measure import spread, table
from torch import nn

from fedray import PRESETS, Config
from fedray.data.dataset import Dataset
from fedray.federation.plan import make_plan
from fedray.federation.pool import LocalPool
from fedray.federation.round import Session, run_round
from fedray.memory import keep_freed_memory
from fedray.record.checkpoint import State
from fedray.tasks.ddpm import DDPM
from fedray.vector.optimizer import Optimizer


@dataclass(frozen=True)
class Tiny:
    """1,000 parameters, 8 images for each client."""

    name: ClassVar[str] = "tiny"
    clients: int = 1000

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        rng = np.random.default_rng(0)
        n = 8 * self.clients
        return Dataset(rng.integers(0, 256, (n, 1, 10, 10), dtype=np.uint8), np.arange(n) % 10)

    def build(self, device: torch.device) -> Learner:
        return Learner()


@dataclass(frozen=True)
class Faces(DDPM):
    """The paper's network, on generated images."""

    name: ClassVar[str] = "generated-faces"

    def check(self, sampler: str, steps: int) -> None:
        pass

    def dataset(self) -> Dataset:
        return Dataset(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64), np.uint8))


GOALS = {"4 kB": "1.5", "455 MB": "1.2"}

# In place of a run directory, and so of another type: what a round asks of it.
NOTHING = SimpleNamespace(generation=lambda *_: None, recall=lambda *_: {}, remember=lambda *_: None)


def engine(config: Config) -> Callable[[], None]:
    """Make a function that does one round, without a run directory."""
    dataset = config.task.dataset()
    plan = make_plan(config, dataset)
    session = Session(config, plan, LocalPool(config, dataset), NOTHING)  # type: ignore[arg-type]
    state = State(0, config.method.init(plan.initial, plan.layout))

    def round() -> None:
        for _ in run_round(session, state):
            pass

    return round


def bare_tiny(config: Config) -> Callable[[], None]:
    """The loop over tiny clients: load the model, one step, add the result up."""
    dataset = config.task.dataset()
    shards, network = make_plan(config, dataset).shards, nn.Linear(100, 10, bias=False)
    initial = network.weight.detach().clone()

    def round() -> None:
        total = torch.zeros_like(initial)
        for client in range(config.clients):
            with torch.no_grad():
                network.weight.copy_(initial)
            optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, fused=True)
            chosen = shards[client][torch.randperm(8).numpy()]
            images = torch.from_numpy(dataset.images[chosen]).flatten(1).float() / 255
            assert dataset.labels is not None
            loss = F.cross_entropy(network(images), torch.from_numpy(dataset.labels[chosen]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            total.add_(network.weight.detach(), alpha=1 / config.clients)

    return round


def bare_faces(config: Config) -> Callable[[], None]:
    """One step for each client with diffusers and torch alone."""
    assert isinstance(config.task, Faces)
    unet, scheduler = config.task.unet(), config.task.scheduler()
    images = torch.from_numpy(config.task.dataset().images).float() / 127.5 - 1

    def round() -> None:
        for client in range(config.clients):
            optimizer = torch.optim.AdamW(unet.parameters(), config.learning_rate, fused=True)
            clean = images[client : client + 1]
            t, noise = torch.randint(1000, (1,)), torch.randn(clean.shape)
            F.mse_loss(unet(scheduler.add_noise(clean, noise, t), t).sample, noise).backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return round


def main(repeats: int = 7, large: bool = True) -> None:
    """Measure.

    Args:
        repeats: how often each is measured, in turns, after a first round that does not count.
        large: the paper's U-Net too (5 GB of memory, some minutes).
    """
    torch.set_num_threads(1)
    keep_freed_memory()  # as `fedray train` does; for both sides
    common: dict[str, Any] = dict(local_steps=1, evaluate_samples=0, actors=0, rounds=1000, optimizer=Optimizer())
    # `Learner` cannot sample, which nothing here asks for: so it is no `Task` to a type checker.
    cases: dict[str, tuple[Config, Callable[[Config], Callable[[], None]]]] = {
        "4 kB": (Config(task=Tiny(), clients=1000, train_batch_size=8, **common), bare_tiny)  # type: ignore[arg-type]
    }
    if large:
        celeba = PRESETS["celeba"].task
        task = Faces(**{name: getattr(celeba, name) for name in DDPM.__dataclass_fields__ if name != "name"})
        cases["455 MB"] = (Config(task=task, clients=2, train_batch_size=1, **common), bare_faces)
    rows = []
    for name, (config, bare) in cases.items():
        ours, theirs = engine(config), bare(config)
        times: list[tuple[float, float]] = []
        for repeat in range(repeats + 1):
            pair = []
            for work in (theirs, ours):
                started = time.perf_counter()
                work()
                pair.append((time.perf_counter() - started) / config.clients * 1e3)
            if repeat:
                times.append((pair[0], pair[1]))
        ratios = [b / a for a, b in times]
        bare_ms, ours_ms = (list(column) for column in zip(*times, strict=True))
        rows.append([name, spread(bare_ms), spread(ours_ms), spread(ratios), GOALS[name]])
    table(["model", "bare loop, ms a client", "fedray", "ratio", "goal"], rows)


if __name__ == "__main__":
    tyro.cli(main)

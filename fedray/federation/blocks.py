"""Blocks: clients of one round that a process trains and folds before anything travels.

A block is accepted whole: its partial, its rows and its memories count together or not at all. How clients are
grouped changes no bit, so sizes follow measured durations and are nobody's setting.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fedray.algorithms import Round, Tensors, Upload
from fedray.federation.local import TrainJob, client_update
from fedray.federation.pool import Reply
from fedray.federation.worker import Shared, Worker, do
from fedray.record.run import Row
from fedray.wire import Payload

SECONDS = 1.0  # of training in a block, where there is so much: the rest of the machine waits no longer at the end
MEMORIES = 256e6  # bytes of clients' memories in a block, beyond the first client's


@dataclass(frozen=True, eq=False)
class TrainBlock:
    """A job to train some clients of a round."""

    jobs: tuple[TrainJob, ...]

    @property
    def key(self) -> tuple[str | int, ...]:
        return ("block", *self.jobs[0].key)

    def __str__(self) -> str:
        return ", ".join(map(str, self.jobs))


class Block(NamedTuple):
    """Trained clients: a row for each, the partial of their uploads, and what each keeps, by client."""

    rows: list[Row]
    partial: Any
    memories: dict[int, Payload]


def train_block(worker: Worker, shared: Shared, block: TrainBlock) -> tuple[Row, Block]:
    """Train clients and fold what they send. One that fails has a row that says why, and changes nothing else."""
    fold, round = worker.config.fold, shared.about
    done = Block([], fold.start(round), {})
    for job in block.jobs:
        row, changed = do(worker, _train_and_fold, (shared, done.partial), job)
        if "error" not in row:
            partial, memory = changed
            done = done._replace(partial=partial)
            if memory:
                done.memories[job.client] = memory
        done.rows.append({"client": job.client, "examples": len(job.indices), **row})
        worker.client()
    return {}, done


def _train_and_fold(worker: Worker, inputs: tuple[Shared, Any], job: TrainJob) -> tuple[Row, tuple[Any, Payload]]:
    """Train one client, and add it to a partial."""
    (shared, partial), config = inputs, worker.config
    round: Round = shared.about
    row, trained = client_update(worker, shared, job)
    tensors = config.links.decode(trained.payload, round)
    check_values(tensors, config.fold.bound)
    weights = {name: round.weight(job.client, name) for name in tensors}
    numbers = {"examples": row["examples"], "steps": row["steps"], **trained.rows}
    partial = config.fold.add(partial, Upload(job.client, tensors, weights, numbers), round)
    return row | ({"algorithm": trained.rows} if trained.rows else {}), (partial, trained.memory)


def check_values(tensors: Tensors, bound: float) -> None:
    """Raise `FloatingPointError` unless all values are finite, and smaller than what the fold can add up."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = map(float, torch.aminmax(tensor))  # NaN where there is one
        if not -bound < low <= high < bound:
            what = "trained weights" if name == "model" else name
            reach = "finite" if not torch.isfinite(tensor).all() else f"all smaller than {bound:g}"
            raise FloatingPointError(f"the {what} are not {reach} (lower the learning rate?)")


class Pace:
    """How long clients take, measured: the size of blocks follows from it."""

    def __init__(self) -> None:
        self.seconds_per_step: float | None = None
        self.memory = 0  # bytes, of the largest seen

    def learn(self, block: Block) -> None:
        """Take note of a block's durations, and of its memories' size."""
        steps = sum(row.get("steps", 0) for row in block.rows)
        if steps:
            found = sum(row["seconds"] for row in block.rows if "steps" in row) / steps
            before = self.seconds_per_step
            self.seconds_per_step = found if before is None else (before + found) / 2
        for memory in block.memories.values():
            self.memory = max(self.memory, sum(array.nbytes for array in memory.values()))

    def take(self, todo: deque[int], steps: Callable[[int], int], workers: int) -> list[int]:
        """Take the clients of the next block from those to be done.

        One while nothing is known; later as many as fill `SECONDS`, and fewer towards the end of a round.
        """
        taken = [todo.popleft()]
        if self.seconds_per_step is None:
            return taken
        left = sum(map(steps, todo)) + steps(taken[0])
        budget = min(SECONDS / max(self.seconds_per_step, 1e-9), left / (2 * workers))  # steps
        filled = steps(taken[0])
        while todo and filled + steps(todo[0]) <= budget and self.memory * (len(taken) + 1) <= MEMORIES:
            taken.append(todo.popleft())
            filled += steps(taken[-1])
        return taken


class Queue:
    """The clients of a round: those to be done, and those whose block was accepted. Each is accepted once."""

    def __init__(self, round: Round) -> None:
        self.round = round
        self.todo = deque(round.cohort)
        self.accepted: set[int] = set()

    def take(self, pace: Pace, steps: Callable[[int], int], workers: int) -> list[int]:
        """Take the clients of the next block; none where none is left."""
        if self.accepted:  # one that was given up for lost may have come late
            self.todo = deque(client for client in self.todo if client not in self.accepted)
        return pace.take(self.todo, steps, workers) if self.todo else []

    def accept(self, reply: Reply) -> bool:
        """Accept a block, or have it done again: one that is lost, or that holds a client that was accepted before."""
        clients = [job.client for job in reply.job.jobs]
        if any(job.round != self.round.number for job in reply.job.jobs):
            return False  # of a round that is over
        if reply.lost or self.accepted & set(clients):
            self.todo.extend(client for client in clients if client not in self.accepted)
            return False
        self.accepted |= set(clients)
        return True

"""Blocks: clients of one round that a process trains and folds before anything travels.

A block is accepted whole: its partial, its rows and its memories count together or not at all. How clients are
grouped changes no bit, so sizes follow measured durations and are nobody's setting.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

import torch

from fedray.algorithms import Round, Tensors, Upload, of_model
from fedray.federation.causes import COUNTED, Cause, Lost
from fedray.federation.local import TrainJob, client_update
from fedray.federation.pool import Reply
from fedray.federation.ranks import filled_in
from fedray.federation.worker import Key, Parts, Shared, Worker, do
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
    """Trained clients: a row for each, the partial of their uploads, and what each keeps, by client.

    Or a partial alone, that had stayed on its node when its clients' rows came.
    """

    rows: list[Row]
    partial: Any
    memories: dict[int, Payload]


def train_block(worker: Worker, shared: Shared, block: TrainBlock) -> tuple[Row, Parts | None]:
    """Train clients and fold what they send. One that fails has a row that says why, and changes nothing else.

    If one breaks this process, the block has failed.
    """
    fold, round = worker.config.fold, shared.about
    done, keys = Block([], fold.start(round), {}), list[Key]()
    for job in block.jobs:
        row, changed = do(worker, _train_and_fold, (shared, done.partial), job)
        if row.get("cause") == Cause.BROKEN:
            return row, None
        if "error" not in row:
            partial, memory = changed
            done = done._replace(partial=partial)
            keys.append(job.key)
            if memory:
                done.memories[job.client] = memory
        done.rows.append({"client": job.client, "examples": len(job.indices), **row})
        worker.client()
    return {}, Parts(done._replace(partial=None), done.partial, tuple(keys))


def merge_partials(worker: Worker, shared: Shared, first: Any, *others: Any) -> Any:
    """Make one partial of several blocks'."""
    fold, round = worker.config.fold, shared.about
    start = fold.start(round) if first is None else first
    return reduce(lambda merged, other: fold.merge(merged, other, round), others, start)


def _train_and_fold(worker: Worker, inputs: tuple[Shared, Any], job: TrainJob) -> tuple[Row, tuple[Any, Payload]]:
    """Train one client, and add it to a partial."""
    (shared, partial), config = inputs, worker.config
    round: Round = shared.about
    row, trained = client_update(worker, shared, job)
    received = config.links.arrive(shared.arrays, round) if config.links.lossy else None
    tensors = filled_in(config.links.decode(trained.payload, round), job.client, round, received)
    check_values(tensors, config.fold.bound)
    weights = {name: round.weight(job.client, name) for name in tensors}
    known = ("examples", "steps") if config.method.hides_examples else ("examples", "steps", "loss")
    numbers = {name: row[name] for name in known} | trained.rows
    partial = config.fold.add(partial, Upload(job.client, tensors, weights, numbers), round)
    return row | ({"algorithm": trained.rows} if trained.rows else {}), (partial, trained.memory)


def check_values(tensors: Tensors, bound: float) -> None:
    """Raise `FloatingPointError` unless all values are finite, and smaller than what the fold can add up."""
    for name, tensor in tensors.items():
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        low, high = map(float, torch.aminmax(tensor))  # NaN where there is one
        if not -bound < low <= high < bound:
            what = "the trained weights are" if of_model(name) else f"the tensor {name!r} that it sends is"
            reach = "finite" if not torch.isfinite(tensor).all() else f"everywhere below {bound:g}"
            raise FloatingPointError(f"{what} not {reach}" + (" (lower the learning rate?)" if of_model(name) else ""))


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
    """The clients of a round: those to be done, and those whose block was accepted. Each is accepted once.

    A client whose block was lost is done again, alone: one that ends its process would take others with it. One that
    is out of memory even so waits for the others; then `after` has it done again if the pool could make room.
    """

    DEATHS = 3  # of processes that did a client, after which it is left out

    def __init__(self, round: Round, retries: int = 0, dropped: Collection[int] = ()) -> None:
        self.round = round
        self.retries = retries  # of a client that fails
        self.failures: Counter[int] = Counter()
        self.todo = deque(client for client in round.cohort if client not in dropped)
        self.alone: deque[int] = deque()  # to be done again
        self.cramped: dict[int, Row] = {}  # out of memory though alone; the rows of clients that are left out
        self.accepted: set[int] = set()
        self.held: set[int] = set()  # of these, those whose partial is still on the node that made it
        self.reopened: set[int] = set()  # those whose partial was lost after that
        self.deaths: Counter[int] = Counter()
        self.losses: list[Row] = []  # for the record: what was done in vain, and whether its process was lost
        self.began: dict[int, float] = {}  # when a client's last block was taken

    @property
    def empty(self) -> bool:
        return not (self.todo or self.alone or self.cramped or self.held)

    def take(self, pace: Pace, steps: Callable[[int], int], workers: int) -> list[int]:
        """Take the clients of the next block; none where none is left."""
        taken = self._take(pace, steps, workers)
        self.began.update(dict.fromkeys(taken, time.perf_counter()))
        return taken

    def _take(self, pace: Pace, steps: Callable[[int], int], workers: int) -> list[int]:
        if self.todo:
            return pace.take(self.todo, steps, workers)
        while self.alone:
            client = self.alone.popleft()
            if client not in self.accepted:  # a pool may deliver late what it had given up for lost
                return [client]
        return []

    def since(self, jobs: Iterable[TrainJob]) -> float:
        """Return for how many seconds the first of them has been taken; 0 for none, or those of another round."""
        now = time.perf_counter()
        return now - min((self.began.get(job.client, now) for job in jobs), default=now)

    def receive(self, reply: Reply, nothing: Any) -> Block | None:
        """Return the block that counts; None for one to be done again: lost, or with a client accepted before.

        Args:
            nothing: the partial of no client.
        """
        if reply.holds:
            return self._arrive(reply)
        jobs = {job.client: job for job in reply.job.jobs if job.client not in self.accepted}
        if any(job.round != self.round.number for job in reply.job.jobs):
            return None  # of a round that is over
        whole, block = len(jobs) == len(reply.job.jobs), None
        lost = Lost(reply.lost, reply.cause) if reply.lost else None
        if whole and not lost:
            try:
                block = self._open(reply, nothing) if reply.ok else Block(failed(jobs.values(), reply.row), nothing, {})
            except Lost as error:
                lost = error
        if lost:
            self._note(list(jobs), lost.cause, str(lost), self.since(jobs.values()), actor=True)
            self.deaths.update(list(jobs) if lost.cause in COUNTED else ())
            block = self._give_up(jobs, lost, nothing) if len(reply.job.jobs) == 1 else None
        if block is None:
            self.alone.extend(client for client in jobs if client not in self.cramped)
            return None
        rows = block.rows if lost else [row for row in block.rows if not self._again(row, len(block.rows) == 1)]
        self.accepted |= {row["client"] for row in rows}
        return block._replace(rows=rows)

    def _open(self, reply: Reply, nothing: Any) -> Block:
        """Fetch a block; take note of its clients if their partial stays where it is."""
        parts: Parts = reply.fetch()
        if parts.partial is None:
            self.held.update(int(client) for _, _, client in parts.keys)
        return parts.now._replace(partial=nothing if parts.partial is None else parts.partial)

    def _arrive(self, reply: Reply) -> Block | None:
        """Return a partial that had stayed on its node; have its clients done again if it is lost."""
        clients = {int(client) for _, number, client in reply.holds if number == self.round.number}
        ours, lost = sorted(clients & self.held), Lost(reply.lost, reply.cause)
        if not ours:
            return None
        self.held -= clients
        if len(ours) < len(reply.holds):
            lost = Lost("some of its clients were done again meanwhile", Cause.NODE)
        elif not reply.lost:
            try:
                return Block([], reply.fetch(), {})
            except Lost as error:
                lost = error
        self._note(ours, lost.cause, str(lost), time.perf_counter() - min(self.began[client] for client in ours))
        self.accepted.difference_update(ours)
        self.reopened.update(ours)
        self.todo.extend(ours)
        return None

    def after(self, room: bool, nothing: Any) -> Block:
        """Have clients that were out of memory done again, if the pool has made room for them; else leave them out."""
        cramped = {client: row for client, row in self.cramped.items() if client not in self.accepted}
        self.cramped.clear()
        if room:
            self.alone.extend(cramped)
            return Block([], nothing, {})
        self.accepted |= cramped.keys()
        return Block(list(cramped.values()), nothing, {})

    def _give_up(self, jobs: dict[int, TrainJob], lost: Lost, nothing: Any) -> Block | None:
        """Return the failure of a client that was alone when its process was lost, if that was once too often."""
        for client, job in jobs.items():
            row = {"error": str(lost), "cause": lost.cause, "actor": "", "node": "", "seconds": 0.0}
            if lost.cause == Cause.MEMORY:
                self.cramped[client] = failed([job], row)[0]
            if self.deaths[client] >= self.DEATHS:
                row["error"] = f"its process was lost {self.DEATHS} times; at last: {lost}"
                return Block(failed([job], row), nothing, {})
        return None

    def _again(self, row: Row, alone: bool) -> bool:
        """Tell whether a client that failed is to be done again, and take note of it."""
        if "error" not in row:
            return False
        client, cause = row["client"], row["cause"]
        if cause == Cause.MEMORY and alone:
            self.cramped[client] = row
        elif cause == Cause.MEMORY or self.failures[client] < self.retries:
            self.failures[client] += cause != Cause.MEMORY
            self.alone.append(client)
        else:
            return False
        self._note([client], cause, row["error"], row["seconds"])
        return True

    def _note(self, clients: list[int], cause: Cause, reason: str, seconds: float, actor: bool = False) -> None:
        loss = {"clients": clients, "cause": cause, "reason": reason, "seconds": seconds, "actor": actor}
        self.losses.append(loss)


def failed(jobs: Iterable[TrainJob], row: Row) -> list[Row]:
    """Return the rows of clients that could not be done at all."""
    return [{"client": job.client, "examples": len(job.indices), **row} for job in jobs]

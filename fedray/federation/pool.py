"""Pools map work over jobs; each decides where, and in which order, the jobs run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch

from fedray.config import Config
from fedray.data.canaries import plant
from fedray.data.dataset import Dataset
from fedray.errors import RunError, UserError
from fedray.federation.causes import Cause, Lost
from fedray.federation.worker import Key, Work, Worker, device_of, do
from fedray.record.run import Row

Progress = Callable[[int], None]  # how many steps of this map are done

ATTEMPTS = 3


@dataclass(frozen=True, eq=False)
class Reply:
    """The answer to one job. A failure is a reply too: then `row` has an "error"; so is a job that was lost."""

    index: int  # of the job
    job: Any
    row: dict[str, Any]  # small: what the record keeps
    fetch: Callable[[], Any]  # the payload, moved only when asked for
    lost: str = ""  # why, where the job was lost with the process that did it: to be done again
    cause: Cause = Cause.ACTOR  # of the loss
    holds: tuple[Key, ...] = ()  # not the answer to a job, but a partial that had stayed on a node, of these

    @property
    def ok(self) -> bool:
        return "error" not in self.row


def failure(sentence: str, error: str, trace: str) -> Exception:
    """Return the exception for what failed as a job's row says: the user's own mistake, or `sentence` and a trace."""
    kind, _, said = error.partition(": ")
    if kind == UserError.__name__:
        return UserError(said)
    failed = RunError(sentence)
    failed.add_note(trace)
    return failed


class Pool(Protocol):
    @property
    def workers(self) -> int:
        """How many jobs it does at a time."""

    @property
    def nodes(self) -> frozenset[str]:
        """The machines of its cluster that are alive, by their names there."""

    def apart(self) -> Sequence["Pool"]:
        """Return as many pools as can work in parallel."""

    def map(self, work: Work, shared: Any, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        """Yield one reply per job, in any order; jobs are drawn as workers become free.

        Where `shared` has a `merge`, partials (`Parts`) whose replies are fetched may stay on their nodes and are
        merged there; they come as replies that say what they hold, the last of them at the end.
        """

    def make_room(self) -> bool:
        """Do fewer jobs at a time from now on, each with more memory; return False where that is not possible.

        Not while jobs are mapped.
        """

    def losses(self) -> list[Row]:
        """Return what its processes suffered since it was last asked, beside the jobs that were lost."""

    def usage(self) -> dict[str, Row]:
        """Return what each node's workers waited, and what crossed between it and this one, since it was last asked."""

    def printed(self, last: bool = False) -> dict[str, str]:
        """Return what its processes printed since it was last asked, by their names; nothing of this process itself.

        Args:
            last: all of it, until now; else what is known without asking them.
        """


class LocalPool:
    """A pool that does jobs sequentially in this process, without Ray."""

    workers = 1
    nodes = frozenset[str]()

    def __init__(self, config: Config, dataset: Dataset | None = None) -> None:
        device = device_of(config)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise UserError(f"--gpus-per-actor {config.gpus_per_actor:g}: this machine has no GPU.")
        self.worker = Worker(config, device, "local")
        if dataset is not None:
            self.worker.dataset = plant(dataset, config.canaries, config.seed)

    def apart(self) -> list["LocalPool"]:
        return [self]

    def map(self, work: Work, shared: Any, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        begin = self.worker.done.steps
        self.worker.on_step = lambda done: progress(done - begin)
        for index, job in enumerate(jobs):
            row, payload = do(self.worker, work, shared, job)
            yield Reply(index, job, row, partial(_same, payload))

    def make_room(self) -> bool:
        return False

    def losses(self) -> list[Row]:
        return []

    def usage(self) -> dict[str, Row]:
        return {}

    def printed(self, last: bool = False) -> dict[str, str]:
        return {}


def _same(payload: Any) -> Any:
    return payload


def in_order(
    pool: Pool,
    work: Work,
    shared: Any,
    jobs: Iterable[Any],
    progress: Progress,
    load: Callable[[Any], Any] = lambda job: job,
) -> Iterator[Reply]:
    """Yield a reply for each job, in their order, each as soon as all before it are there.

    Lost ones are done again; so are those that were out of memory, for as long as the pool can make room.

    Args:
        load: adds to a job what is too large to be held for all of them, when a worker is free for it.

    Raises:
        RunError: a job was lost `ATTEMPTS` times.
    """
    todo, early, due, reason, attempts = dict(enumerate(jobs)), dict[int, Reply](), 0, "", 0

    def in_turn() -> Iterator[Reply]:
        nonlocal due
        while due in early:
            yield early.pop(due)
            due += 1

    while todo and attempts < ATTEMPTS:
        asked, cramped, crowded = list(todo.items()), list[Reply](), False
        for reply in pool.map(work, shared, (load(job) for _, job in asked), progress):
            try:
                payload = reply.fetch() if reply.ok and not reply.lost else None
            except Lost as error:
                reply = replace(reply, lost=str(error), cause=error.cause)
            index, job = asked[reply.index]
            reply = replace(reply, job=job)
            if reply.lost:
                reason, crowded = reply.lost, crowded or reply.cause == Cause.MEMORY
            elif reply.row.get("cause") == Cause.MEMORY:
                cramped.append(replace(reply, index=index))
            elif todo.pop(index, None) is not None:
                early[index] = replace(reply, index=index, fetch=partial(_same, payload))
            yield from in_turn()
        attempts += 1
        if cramped or crowded:
            if pool.make_room():
                attempts = 0
            else:
                for reply in cramped:
                    del todo[reply.index]
                    early[reply.index] = reply
                yield from in_turn()
    if todo:
        raise RunError(f"{next(iter(todo.values()))} was lost {ATTEMPTS} times; at last: {reason}.")

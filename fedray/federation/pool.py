"""Pools map work over jobs; each decides where, and in which order, the jobs run."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import RunError, UserError
from fedray.federation.worker import Work, Worker, do

Progress = Callable[[int], None]  # how many steps of this map are done


@dataclass(frozen=True, eq=False)
class Reply:
    """The answer to one job. A failure is a reply too: then `row` has an "error"; so is a job that was lost."""

    index: int  # of the job
    job: Any
    row: dict[str, Any]  # small: what the record keeps
    fetch: Callable[[], Any]  # the payload, moved only when asked for
    lost: bool = False  # with the process that did it: to be done again

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
    workers: int  # jobs that it does at a time

    def apart(self) -> Sequence["Pool"]:
        """Return as many pools as can work in parallel."""

    def map(self, work: Work, shared: Any, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        """Yield one reply per job, in any order; jobs are drawn as workers become free."""


class LocalPool:
    """A pool that does jobs sequentially in this process, without Ray."""

    workers = 1

    def __init__(self, config: Config, dataset: Dataset | None = None) -> None:
        if config.gpus_per_actor and not torch.cuda.is_available():
            raise UserError(f"--gpus-per-actor {config.gpus_per_actor:g}: this machine has no GPU.")
        self.worker = Worker(config, torch.device("cuda" if config.gpus_per_actor else "cpu"), "local")
        if dataset is not None:
            self.worker.dataset = dataset

    def apart(self) -> list["LocalPool"]:
        return [self]

    def map(self, work: Work, shared: Any, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        begin = self.worker.done.steps
        self.worker.on_step = lambda done: progress(done - begin)
        for index, job in enumerate(jobs):
            row, payload = do(self.worker, work, shared, job)
            yield Reply(index, job, row, partial(_same, payload))


def _same(payload: Any) -> Any:
    return payload


def in_order(replies: Iterable[Reply]) -> Iterator[Reply]:
    """Yield replies in the order of their jobs, each as soon as all before it are there."""
    early: dict[int, Reply] = {}
    due = 0
    for reply in replies:
        early[reply.index] = reply
        while due in early:
            yield early.pop(due)
            due += 1

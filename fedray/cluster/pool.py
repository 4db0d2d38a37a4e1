"""A pool of client actors, and the pool that a configuration asks for."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from fedray.cluster.actors import (
    START_TIMEOUT,
    ClientActor,
    count_actors,
    describe,
    describe_need,
    explain,
    make_options,
)
from fedray.cluster.connection import connected, send_own_code
from fedray.cluster.messages import unpack
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import RunError
from fedray.federation.pool import LocalPool, Pool, Progress, Reply
from fedray.federation.worker import Done, Shared, Work

TRANSFER_TIMEOUT = 600.0  # seconds for one payload to reach the driver
POLL = 0.5  # seconds between looks at the progress of running jobs


class RayPool:
    """A pool of client actors, each doing one job at a time."""

    def __init__(self, actors: list[Any], timeout: float) -> None:
        self.actors = actors
        self.workers = len(actors)
        self.timeout = timeout
        self._sent: dict[str, tuple[np.ndarray, Any]] = {}  # arrays that have been put, and where they are, by name

    @classmethod
    def start(cls, config: Config, dataset: Dataset | None = None) -> "RayPool":
        """Start the actors. They open `dataset` where their node has it.

        Raises:
            UserError: the actors do not fit.
            RunError: an actor does not start.
        """
        send_own_code()
        count = count_actors(config)
        share = make_options(config.cpus_per_actor, config.gpus_per_actor)
        client = ray.remote(concurrency_groups={"progress": 1}, **share)(ClientActor)
        data = (None, None) if dataset is None else (dataset.source, dataset.sha256)
        pool = cls([client.remote(config, index, *data) for index in range(count)], config.client_timeout)
        try:
            ray.get([actor.__ray_ready__.remote() for actor in pool.actors], timeout=START_TIMEOUT)
        except GetTimeoutError:
            pool.close()
            raise RunError(
                f"{count} client actors did not start in {START_TIMEOUT:.0f} s. They need "
                f"{describe_need(config, count)}; free now: {describe(ray.available_resources())}."
            ) from None
        except RayError as error:
            pool.close()
            raise RunError(f"a client actor could not start: {explain(error)}.") from None
        return pool

    def renew(self, config: Config, dataset: Dataset | None = None) -> None:
        """Make the actors those of another run that asks for the same share of the machine: they keep their imports."""
        send_own_code()
        data = (None, None) if dataset is None else (dataset.source, dataset.sha256)
        done = [actor.renew.remote(config, *data) for actor in self.actors]
        for index, ref in enumerate(done):
            _fetch(ref, f"the next run (actor {index})")
        self.timeout = config.client_timeout

    def apart(self) -> list["RayPool"]:
        return [RayPool([actor], self.timeout) for actor in self.actors]

    def map(self, work: Work, shared: Shared, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        about = ray.put(shared.about)
        names, arrays = tuple(shared.arrays), [self._put(name, array) for name, array in shared.arrays.items()]
        queue = enumerate(jobs)
        idle = list(self.actors)
        running: dict[Any, _Call] = {}
        begin = {actor: self._progress(actor) for actor in self.actors}
        looked = time.monotonic()
        while True:
            while idle and (item := next(queue, None)) is not None:
                (index, job), actor = item, idle.pop()
                row, payload = actor.do.remote(work, job, about, names, *arrays)
                running[row] = _Call(index, job, payload, actor, time.monotonic() + self.timeout)
            if not running:
                return
            ready, _ = ray.wait(list(running), timeout=POLL, fetch_local=False)
            for ref in ready:
                call = running.pop(ref)
                row = _fetch(ref, str(call.job))
                idle.append(call.actor)
                yield Reply(call.index, call.job, row, partial(_open, call.payload, str(call.job)))
            if time.monotonic() > looked + POLL:
                now = {actor: self._progress(actor) for actor in self.actors}
                progress(sum(now[actor].steps - begin[actor].steps for actor in self.actors))
                looked = time.monotonic()
                for call in running.values():
                    call.look(now[call.actor].clients, self.timeout)

    def _put(self, name: str, array: np.ndarray) -> Any:
        """Put an array into the object store, unless it is the last one of that name that was."""
        sent = self._sent.get(name)
        # The array that was put is held, so another at its address is the same.
        if sent is None or sent[0].ctypes.data != array.ctypes.data or sent[0].nbytes != array.nbytes:
            sent = self._sent[name] = (array, ray.put(array))
        return sent[1]

    def _progress(self, actor: Any) -> Done:
        return _fetch(actor.progress.remote(), f"its progress (actor {self.actors.index(actor)})")

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


@dataclass
class _Call:
    """A job that an actor is doing."""

    index: int
    job: Any
    payload: Any
    actor: Any
    deadline: float  # for the next client
    clients: int = -1  # that the actor had done when it was looked at

    def look(self, clients: int, timeout: float) -> None:
        """Set the deadline anew when another client is done; raise `RunError` when it has passed."""
        if clients > self.clients:
            self.clients, self.deadline = clients, time.monotonic() + timeout
        elif time.monotonic() > self.deadline:
            raise RunError(f"{self.job} has not answered for {timeout:.0f} s (--client-timeout).")


def _fetch(ref: Any, what: str) -> Any:
    """Bring a result to this process. Raises `RunError` if it is lost or late."""
    try:
        return ray.get(ref, timeout=TRANSFER_TIMEOUT)
    except GetTimeoutError:
        raise RunError(f"the result of {what} did not arrive in {TRANSFER_TIMEOUT:.0f} s.") from None
    except RayActorError as error:
        raise RunError(f"the client actor doing {what} died: {explain(error)}.") from None
    except RayError as error:
        raise RunError(f"the result of {what} is lost: {explain(error)}.") from None


def _open(ref: Any, what: str) -> Any:
    """Bring a job's payload to this process."""
    return unpack(_fetch(ref, what))


@contextmanager
def open_pool(config: Config, dataset: Dataset | None = None) -> Iterator[Pool]:
    """Open the pool that the configuration asks for, and close it after the block."""
    if config.actors == 0:
        yield LocalPool(config, dataset)
        return
    with connected(config.address):
        pool = RayPool.start(config, dataset)
        try:
            yield pool
        finally:
            pool.close()

"""A pool of client actors, and the pool that a configuration asks for."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from fedray.cluster.actors import (
    ENDED,
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
from fedray.federation.pool import LocalPool, Lost, Pool, Progress, Reply
from fedray.federation.worker import Done, Shared, Work

TRANSFER_TIMEOUT = 600.0  # seconds for one payload to reach the driver
IN_A_ROW = 8  # actors that may end without a result between them, before it is not a client that ends them
POLL = 0.5  # seconds between looks at the progress of running jobs


class RayPool:
    """A pool of client actors, each doing one job at a time. An actor that dies, or hangs, is replaced."""

    def __init__(self, actors: list["_Actor"], make: Callable[[int], Any], config: Config) -> None:
        self.actors = actors
        self.make = make  # an actor, by its number
        self.config = config
        self._sent: dict[str, tuple[np.ndarray, Any]] = {}  # arrays that have been put, and where they are, by name

    @property
    def workers(self) -> int:
        return len(self.actors)

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])

    @classmethod
    def start(cls, config: Config, dataset: Dataset | None = None) -> "RayPool":
        """Start the actors, and do not wait for them. They open `dataset` where their node has it.

        Raises:
            UserError: the actors do not fit.
        """
        make, count = maker(config, dataset), count_actors(config)
        return cls([_Actor(index, make(index)) for index in range(count)], make, config)

    def renew(self, config: Config, dataset: Dataset | None = None) -> None:
        """Make the actors those of another run that asks for the same share of the machine: they keep their imports."""
        self.make, self.config = maker(config, dataset), config
        try:
            for actor in self.actors:
                _started(actor.ready, actor)
                _fetch(actor.handle.renew.remote(config, *_data(dataset)), f"the next run (actor {actor.index})")
        except Lost as error:
            raise RunError(f"an actor cannot go on to the next run: {error}.") from None

    def apart(self) -> list["RayPool"]:
        return [RayPool([actor], self.make, self.config) for actor in self.actors]

    def map(self, work: Work, shared: Shared, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        about = ray.put(shared.about)
        names, arrays = tuple(shared.arrays), [self._put(name, array) for name, array in shared.arrays.items()]
        queue, deaths, looked, timeout = enumerate(jobs), 0, time.monotonic(), self.config.client_timeout
        self._look(5.0)
        begin = sum(actor.done.steps for actor in self.actors)
        idle = [actor for actor in self.actors if actor.started]
        starting = {actor.ready: actor for actor in self.actors if not actor.started}
        running: dict[Any, _Call] = {}
        while True:
            while idle and (item := next(queue, None)) is not None:
                (index, job), actor = item, idle.pop()
                row, payload = actor.handle.do.remote(work, job, about, names, *arrays)
                running[row] = _Call(index, job, payload, actor, time.monotonic() + timeout, actor.done.clients)
            if not running and (idle or not starting):
                return
            waited = [*running, *starting]
            ray.wait(waited, timeout=POLL, fetch_local=False)
            ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0, fetch_local=False)
            overdue = []
            if time.monotonic() > looked + POLL:
                looked = time.monotonic()
                self._look(0.2)
                progress(sum(actor.done.steps for actor in self.actors) - begin)
                self._give_up_late(starting, ready)
                overdue = [ref for ref, call in running.items() if ref not in ready and call.overdue(timeout)]
            for ref in [*ready, *overdue]:
                if ref in starting:
                    actor = starting.pop(ref)
                    try:
                        idle.append(_started(ref, actor))
                    except Lost as error:
                        if not any(other.started for other in self.actors) and str(error) != ENDED:
                            raise RunError(f"a client actor could not start: {error}.") from None
                        deaths = self._replace(actor, starting, deaths, f"{error}, while it started")
                    continue
                call, row, lost = running.pop(ref), {}, ""
                try:
                    if ref in overdue:
                        raise Lost(f"it has not answered for {timeout:.0f} s (--client-timeout)")
                    row = _fetch(ref, str(call.job))
                    deaths = 0
                    idle.append(call.actor)
                except Lost as error:
                    lost = str(error)
                    deaths = self._replace(call.actor, starting, deaths, f"{call.job}: {lost}")
                yield Reply(call.index, call.job, row, partial(_open, call.payload, str(call.job)), lost)

    def _replace(self, actor: "_Actor", starting: dict[Any, "_Actor"], deaths: int, why: str) -> int:
        """Replace an actor; return how many died since the last result. Raises `RunError` if these are too many."""
        if deaths == max(IN_A_ROW, 3 * len(self.actors)):  # a node takes all of its actors with it
            raise RunError(f"client actors end again and again. {why}.")
        actor.replace(self.make(actor.index))
        starting[actor.ready] = actor
        return deaths + 1

    def _look(self, timeout: float) -> None:
        """Take note of what actors have done, of those that answer in time: one that is stopped delays nobody."""
        asked = {actor.ask(): actor for actor in self.actors if actor.started}
        for ref in ray.wait(list(asked), num_returns=len(asked), timeout=timeout)[0] if asked else ():
            asked[ref].hear()

    def _give_up_late(self, starting: dict[Any, "_Actor"], ready: list[Any]) -> None:
        """Go on without actors that do not start: their node may be gone. Raises `RunError` if none is left."""
        for ref, actor in list(starting.items()):
            if ref not in ready and time.monotonic() > actor.began + START_TIMEOUT:
                del starting[ref]
                ray.kill(actor.handle)
                self.actors.remove(actor)
        if not self.actors:
            raise RunError(
                f"no client actor could start in {START_TIMEOUT:.0f} s. One needs {describe_need(self.config, 1)}; "
                f"free now: {describe(ray.available_resources())}."
            )

    def _put(self, name: str, array: np.ndarray) -> Any:
        """Put an array into the object store, unless it is the last one of that name that was."""
        sent = self._sent.get(name)
        # The array that was put is held, so another at its address is the same.
        if sent is None or sent[0].ctypes.data != array.ctypes.data or sent[0].nbytes != array.nbytes:
            sent = self._sent[name] = (array, ray.put(array))
        return sent[1]

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor.handle)


class _Actor:
    """A client actor, the one that replaced it, and so on; and what it was last seen to have done."""

    def __init__(self, index: int, handle: Any) -> None:
        self.index = index
        self.handle = handle
        self.ready = handle.__ray_ready__.remote()
        self.began = time.monotonic()
        self.started = False
        self.done = Done(0, 0)
        self.before = Done(0, 0)  # what those that it replaced had done
        self._asked: Any = None

    def replace(self, handle: Any) -> None:
        ray.kill(self.handle)
        self.handle, self.ready, self._asked = handle, handle.__ray_ready__.remote(), None
        self.before, self.began, self.started = self.done, time.monotonic(), False

    def ask(self) -> Any:
        """Ask what it has done, unless an answer is still due."""
        self._asked = self._asked or self.handle.progress.remote()
        return self._asked

    def hear(self) -> None:
        """Take note of its answer."""
        with suppress(RayError):  # one that died: its job will tell
            done = ray.get(self._asked)
            self.done = Done(self.before.steps + done.steps, self.before.clients + done.clients)
        self._asked = None


@dataclass
class _Call:
    """A job that an actor is doing."""

    index: int
    job: Any
    payload: Any
    actor: _Actor
    deadline: float  # for the next client
    clients: int  # that the actor had done when it was looked at

    def overdue(self, timeout: float) -> bool:
        """Tell whether the deadline has passed; it is set anew when another client is done."""
        if self.actor.done.clients > self.clients:
            self.clients, self.deadline = self.actor.done.clients, time.monotonic() + timeout
        return time.monotonic() > self.deadline


def maker(config: Config, dataset: Dataset | None) -> Callable[[int], Any]:
    """Return a function that makes a client actor of a run, by its number."""
    send_own_code()
    share = make_options(config.cpus_per_actor, config.gpus_per_actor)
    client = ray.remote(concurrency_groups={"progress": 1}, **share)(ClientActor)
    return lambda index: client.remote(config, index, *_data(dataset))


def _data(dataset: Dataset | None) -> tuple[Any, Any]:
    return (None, None) if dataset is None else (dataset.source, dataset.sha256)


def _started(ref: Any, actor: _Actor) -> _Actor:
    """Return an actor that is ready. Raises `Lost` if it was killed meanwhile, or cannot be made."""
    try:
        ray.get(ref, timeout=START_TIMEOUT)
    except RayError as error:
        raise Lost(explain(error)) from None
    actor.started = True
    return actor


def _fetch(ref: Any, what: str) -> Any:
    """Bring a result to this process. Raises `Lost` if the process that made it died, or it does not come."""
    try:
        return ray.get(ref, timeout=TRANSFER_TIMEOUT)
    except GetTimeoutError:
        raise Lost(f"the result of {what} did not arrive in {TRANSFER_TIMEOUT:.0f} s") from None
    except RayError as error:
        raise Lost(explain(error)) from None


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

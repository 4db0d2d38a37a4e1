"""A pool of client actors, and the pool that a configuration asks for."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from fedray.cluster.actors import ClientActor, make_options
from fedray.cluster.calls import Actor, Call
from fedray.cluster.connection import connected, send_own_code
from fedray.cluster.ends import explain
from fedray.cluster.logs import Log, OwnLog
from fedray.cluster.messages import unpack
from fedray.cluster.nodes import Share, alive, count_actors, describe, free, room
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import RunError
from fedray.federation.causes import BLAMELESS, Cause, Lost
from fedray.federation.pool import LocalPool, Pool, Progress, Reply
from fedray.federation.worker import Shared, Work
from fedray.record.run import Row

TRANSFER_TIMEOUT = 600.0  # seconds for one payload to reach the driver
IN_A_ROW = 24  # actors that may end without a result between them: eight clients end three each, then are left out
POLL = 0.5  # seconds between looks at the nodes, and at the progress of running jobs


class RayPool:
    """A pool of client actors, each doing one job at a time.

    An actor that dies, hangs or breaks is replaced, the later the more often in a row (`BackOff`). There are as many as
    were asked for, or as fit: more when a node joins, fewer when one has gone, and fewer with more memory each once
    there was too little.
    """

    def __init__(self, config: Config, dataset: Dataset | None, most: int, fixed: bool, run: str = "") -> None:
        self.config = config
        self.dataset = dataset
        self.most = most  # actors
        self.fixed = fixed  # each actor's share
        self.run = run  # a name for Ray's dashboard
        self.share = Share.of(config)
        self.actors: list[Actor] = []
        self._class = ray.remote(concurrency_groups={"progress": 1})(ClientActor)
        self._losses: list[Row] = []
        self._logs: list[Log] = [OwnLog("driver")]  # and of actors that it goes on without
        self._deaths = 0  # of actors since the last result
        self._sent: dict[str, tuple[np.ndarray, Any]] = {}  # arrays that have been put, and where they are, by name

    @property
    def workers(self) -> int:
        return len(self.actors)

    @property
    def nodes(self) -> frozenset[str]:
        return frozenset(node["NodeID"] for node in ray.nodes() if node["Alive"])

    @classmethod
    def start(
        cls, config: Config, dataset: Dataset | None = None, rows: Iterable[Row] = (), run: str = ""
    ) -> "RayPool":
        """Start the actors, and do not wait for them. They open `dataset` where their node has it.

        Args:
            rows: of the run so far: where its actors were out of memory, each has as much of it as it had at last.

        Raises:
            UserError: the actors do not fit.
        """
        send_own_code()
        found = count_actors(config)
        most = min(config.actors or config.cohort_size, config.cohort_size)
        pool = cls(config, dataset, most, fixed=ray.util.get_current_placement_group() is not None, run=run)
        share = pool.share.at_last(rows)
        if slots := room(share, alive()):  # else not on these nodes: it is found again
            pool.share, found = share, min(found, slots)
        pool._add(found)
        return pool

    def renew(self, config: Config, dataset: Dataset | None = None) -> None:
        """Make the actors those of another run that asks for the same share of the machine: they keep their imports."""
        send_own_code()
        self.config, self.dataset = config, dataset
        try:
            for actor in self.actors:
                if actor.waits:
                    actor.make(self._make(actor.index))
                actor.start(config.start_timeout)
                again = actor.handle.renew.remote(self._settings, *_data(dataset))
                _fetch(again, f"the next run ({actor})", actor)
        except Lost as error:
            raise RunError(f"an actor cannot go on to the next run: {error}.") from None

    def apart(self) -> list["RayPool"]:
        pools = [RayPool(self.config, self.dataset, 1, fixed=True) for _ in self.actors]
        for pool, actor in zip(pools, self.actors, strict=True):
            pool.actors = [actor]
        return pools

    def map(self, work: Work, shared: Shared, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        about = ray.put(shared.about)
        names, arrays = tuple(shared.arrays), [self._put(name, array) for name, array in shared.arrays.items()]
        queue, looked, timeout = enumerate(jobs), time.monotonic(), self.config.client_timeout
        self._fit()
        self._look(5.0)
        begin = sum(actor.done.steps for actor in self.actors)
        idle = [actor for actor in self.actors if actor.started]
        running: dict[Any, Call] = {}
        while True:
            while idle and (item := next(queue, None)) is not None:
                (index, job), actor = item, idle.pop()
                row, payload = actor.handle.do.remote(work, job, about, names, *arrays)
                running[row] = Call(index, job, payload, actor, time.monotonic() + timeout, actor.done.clients)
            if not running and (idle or not self.actors):
                return
            self._make_again()
            starting = {actor.ready: actor for actor in self.actors if not (actor.started or actor.waits)}
            waited = [*running, *starting]
            if waited:
                ray.wait(waited, timeout=POLL, fetch_local=False)
            else:  # all wait to be made again
                time.sleep(POLL)
            ready, _ = ray.wait(waited, num_returns=len(waited), timeout=0, fetch_local=False)
            for ref in [ref for ref in ready if ref in starting]:
                try:
                    idle.append(starting[ref].start())
                except Lost as lost:
                    self._replace(starting[ref], lost)
            overdue = set()
            if time.monotonic() > looked + POLL:
                looked = time.monotonic()
                self._look(0.2)
                progress(sum(actor.done.steps for actor in self.actors) - begin)
                self._fit()
                overdue = {ref for ref, call in running.items() if ref not in ready and call.overdue(timeout)}
            for ref in [ref for ref in [*ready, *overdue] if ref in running]:
                call = running.pop(ref)
                reply = Reply(call.index, call.job, {}, partial(_open, call.payload, str(call.job), call.actor))
                try:
                    if ref in overdue:
                        raise Lost(f"it has not answered for {timeout:.0f} s (--client-timeout)", Cause.DEADLINE)
                    row = _fetch(ref, str(call.job), call.actor)
                    if row.get("cause") == Cause.BROKEN:
                        raise Lost(row["error"], Cause.BROKEN)
                except Lost as lost:
                    self._replace(call.actor, lost, str(call.job))
                    yield replace(reply, lost=str(lost), cause=lost.cause)
                else:
                    self._deaths = 0
                    call.actor.back_off.over()
                    idle.append(call.actor)
                    yield replace(reply, row=row)

    def make_room(self) -> bool:
        larger = self.share.with_room(len(self.actors), alive())
        if self.fixed or larger == self.share:
            return False
        told = f"from now on each actor has {larger.times(1)}, so that fewer share the memory"
        self._note(Cause.MEMORY, told, share=larger._asdict())  # read when the run is resumed
        self.share = larger
        self.close()
        for actor in self.actors:
            self._leave(actor)
        self.actors.clear()
        self._add(min(self.most, room(larger, alive())))
        return True

    def losses(self) -> list[Row]:
        losses, self._losses = self._losses, []
        return losses

    def printed(self, last: bool = False) -> dict[str, str]:
        if last:
            with suppress(RayError):  # a cluster that is gone
                self._look(1.0)
        found: dict[str, str] = {}
        for log in [*self._logs, *(actor.log for actor in self.actors)]:
            if text := log.take():
                found[log.name] = found.get(log.name, "") + text
        del self._logs[1:]
        return found

    def _leave(self, actor: Actor) -> None:
        """Keep what an actor that has ended had printed."""
        actor.log.end()
        self._logs.append(actor.log)

    def _note(self, cause: Cause, reason: str, **more: Any) -> None:
        loss = {"clients": [], "cause": cause, "reason": reason, "seconds": 0.0, "actor": False}
        self._losses.append(loss | more)

    @property
    def _settings(self) -> Config:
        return replace(self.config, gpus_per_actor=self.share.gpus)

    def _make(self, index: int) -> Any:
        """Make a client actor, by its number."""
        options = make_options(*self.share)
        return self._class.options(**options).remote(self._settings, index, *_data(self.dataset), self.run)

    def _add(self, number: int) -> None:
        """Add so many actors, under numbers that are free."""
        for _ in range(number):
            index = next(index for index in count() if index not in {actor.index for actor in self.actors})
            self.actors.append(Actor(index, self._make(index)))

    def _drop(self, actor: Actor, cause: Cause, reason: str) -> None:
        """Go on without an actor."""
        ray.kill(actor.handle)
        self._leave(actor)
        self.actors.remove(actor)
        self._note(cause, f"{actor} {reason}; the run goes on with {len(self.actors)}")

    def _replace(self, actor: Actor, lost: Lost, job: str = "") -> None:
        """Replace an actor that was lost with its job, or while it started; drop it where no node has room for it.

        Raises:
            RunError: no actor can start, or they end again and again.
        """
        if lost.cause == Cause.START and not any(other.started for other in self.actors):
            raise RunError(f"a client actor could not start: {lost}.")
        self._deaths += lost.cause not in BLAMELESS
        if self._deaths > max(IN_A_ROW, 3 * len(self.actors)):
            raise RunError(f"client actors end again and again. {job or actor}: {lost}.")
        if not job:
            self._note(lost.cause, f"{actor} was lost while it started: {lost}")
        if 1 < len(self.actors) > room(self.share, alive()):
            self._drop(actor, lost.cause, "is not made again, as no node has room for it")
        else:
            wait = actor.back_off.wait(lost.cause)
            actor.end(wait)
            if wait:
                many = actor.back_off.ended
                self._note(lost.cause, f"{many} processes in a row ended as {actor}; the next is made in {wait:g} s")

    def _make_again(self) -> None:
        """Make the actors whose time has come."""
        for actor in self.actors:
            if actor.due:
                actor.make(self._make(actor.index))

    def _fit(self) -> None:
        """Have as many actors as there is room for: more where a node has joined, fewer where one has gone.

        Raises:
            RunError: none could start in time.
        """
        waiting = [actor for actor in self.actors if not actor.started]
        slots, timeout = room(self.share, alive()), self.config.start_timeout
        for actor in [actor for actor in waiting if len(self.actors) > slots and not actor.has_its_share]:
            if 1 < len(self.actors) > slots:
                self._drop(actor, Cause.NODE, "is not made again, as no node has room for it")
        late = [actor for actor in self.actors if not actor.started and time.monotonic() > actor.began + timeout]
        if late:
            begun = sum(actor.has_its_share for actor in late)
            why = (
                f"{begun} of {len(late)} have their share of a node and are still starting, {len(late) - begun} wait "
                f"for one with {self.share.times(1)}; free now: {describe(free())}"
            )
            if len(late) == len(self.actors):
                raise RunError(f"no client actor could start in {timeout:g} s (--start-timeout): {why}.")
            for actor in late:
                self._drop(actor, Cause.START, f"did not start in {timeout:g} s (--start-timeout): {why}")
        missing = min(self.most, slots) - len(self.actors)
        if missing > 0 and not waiting:
            self._add(min(missing, room(self.share, free())))

    def _look(self, timeout: float) -> None:
        """Take note of what actors have done, of those that answer in time: one that is stopped delays nobody."""
        asked = {actor.ask(): actor for actor in self.actors if actor.started}
        for ref in ray.wait(list(asked), num_returns=len(asked), timeout=timeout)[0] if asked else ():
            asked[ref].hear()

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


def _data(dataset: Dataset | None) -> tuple[Any, Any]:
    return (None, None) if dataset is None else (dataset.source, dataset.sha256)


def _fetch(ref: Any, what: str, actor: Actor) -> Any:
    """Bring a result to this process. Raises `Lost` if the actor that made it died, or it does not come."""
    try:
        return ray.get(ref, timeout=TRANSFER_TIMEOUT)
    except GetTimeoutError:
        raise Lost(f"the result of {what} did not arrive in {TRANSFER_TIMEOUT:.0f} s", Cause.DEADLINE) from None
    except RayError as error:
        raise explain(error, *actor.place) from None


def _open(ref: Any, what: str, actor: Actor) -> Any:
    """Bring a job's payload to this process."""
    return unpack(_fetch(ref, what, actor))


@contextmanager
def open_pool(config: Config, dataset: Dataset | None = None, run: str = "") -> Iterator[Pool]:
    """Open the pool that the configuration asks for, and close it after the block."""
    if config.actors == 0:
        yield LocalPool(config, dataset)
        return
    with connected(config.address):
        pool = RayPool.start(config, dataset, run=run)
        try:
            yield pool
        finally:
            pool.close()

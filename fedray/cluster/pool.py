"""A pool of client actors, and the pool that a configuration asks for."""

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from fedray.cluster.actors import ClientActor, make_options
from fedray.cluster.calls import Actor, Call
from fedray.cluster.connection import connected, send_own_code
from fedray.cluster.crossing import Crossing, fetch
from fedray.cluster.logs import Logs
from fedray.cluster.nodes import SHORT, Resources, Share, alive, assign, count_actors, describe, draining, free, room
from fedray.cluster.versions import check_versions, difference
from fedray.config import Config
from fedray.data.dataset import Dataset
from fedray.errors import RunError, UserError
from fedray.federation.causes import BLAMELESS, Cause, Lost
from fedray.federation.pool import LocalPool, Pool, Progress, Reply
from fedray.federation.worker import Shared, Work
from fedray.record.run import Row

IN_A_ROW = 24  # actors that may end without a result between them: eight clients end three each, then are left out
POLL = 0.5  # seconds between looks at the nodes, and at the progress of running jobs


class RayPool:
    """A pool of client actors, each doing one job at a time.

    An actor that dies, hangs or breaks is replaced, the later the more often in a row (`BackOff`). There are as many as
    were asked for, or as fit: more when a node joins, fewer when one has gone, and fewer with more memory each once
    there was too little. They are on as few nodes as have room for them; on a node that is being drained they get no
    more jobs.
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
        self._logs = Logs()
        self._deaths = 0  # of actors since the last result
        self._sent: dict[str, tuple[np.ndarray, Any]] = {}  # arrays that have been put, and where they are, by name
        self._crossing = Crossing()
        self._grouped = ray.util.get_current_placement_group() is not None  # which says where actors are
        self._leaving: frozenset[str] = frozenset()  # nodes that are being drained, where there are others
        self._unfit: set[str] = set()  # nodes that have other versions

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
        nodes, share = pool._usable(), pool.share.at_last(rows)
        if slots := room(share, nodes):  # else not on these nodes: it is found again
            pool.share, found = share, min(found, slots)
        pool._add(found, nodes)
        return pool

    def apart(self) -> list["RayPool"]:
        pools = [RayPool(self.config, self.dataset, 1, fixed=True) for _ in self.actors]
        for pool, actor in zip(pools, self.actors, strict=True):
            pool.actors = [actor]
        return pools

    def map(self, work: Work, shared: Shared, jobs: Iterable[Any], progress: Progress) -> Iterator[Reply]:
        self._crossing.drop()
        about = ray.put(shared._replace(arrays={}))
        names, arrays = tuple(shared.arrays), [self._put(name, array) for name, array in shared.arrays.items()]
        queue, looked, timeout = enumerate(jobs), time.monotonic(), self.config.client_timeout
        self._fit(self._usable(), ())
        self._look(5.0)
        begin = sum(actor.done.steps for actor in self.actors)
        idle = [actor.rest() for actor in self.actors if actor.started]
        running: dict[Any, Call] = {}
        while True:
            idle = [actor for actor in idle if actor in self.actors]
            while (able := self._staying(idle)) and (item := next(queue, None)) is not None:
                (index, job), actor = item, able.pop()
                idle.remove(actor)
                onto = self._crossing.begin(actor, job, shared)
                row, payload, left = actor.handle.do.remote(work, job, about, onto and onto.ref, names, *arrays)
                running[row] = Call(index, job, payload, left, onto, actor, time.monotonic() + timeout)
            if not running and (able or not self.actors):  # so there are no more jobs
                yield from self._crossing.gather(self._crossing.nodes, self.actors, about)
                self._crossing.rest(*idle)
                self._crossing.look(about, [ref for _, ref in self._sent.values()])
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
                    actor = starting[ref].start()
                    idle += [actor.rest()] if self._fits_in(actor) else []
                except Lost as lost:
                    self._replace(starting[ref], lost)
            overdue = set()
            if time.monotonic() > looked + POLL:
                looked = time.monotonic()
                self._look(0.2)
                progress(sum(actor.done.steps for actor in self.actors) - begin)
                self._crossing.look(about, [ref for _, ref in self._sent.values()])
                busy, nodes = {call.actor for call in running.values()}, self._usable()
                yield from self._crossing.gather(self._crossing.endangered(self._leaving, busy), self.actors, about)
                self._fit(nodes, busy)
                overdue = {ref for ref, call in running.items() if ref not in ready and call.overdue(timeout)}
            for ref in [ref for ref in [*ready, *overdue] if ref in running]:
                call = running.pop(ref)
                reply = Reply(call.index, call.job, {}, partial(self._crossing.open, call, shared))
                try:
                    if ref in overdue:
                        raise Lost(f"it has not answered for {timeout:.0f} s (--client-timeout)", Cause.DEADLINE)
                    row = fetch(ref, str(call.job), *call.actor.place[:2])
                    if row.get("cause") == Cause.BROKEN:
                        raise Lost(row["error"], Cause.BROKEN)
                except Lost as lost:
                    self._replace(call.actor, lost, str(call.job))
                    yield replace(reply, lost=str(lost), cause=lost.cause)
                else:
                    self._deaths = 0
                    call.actor.back_off.over()
                    idle.append(call.actor.rest())
                    yield replace(reply, row=row)
                self._crossing.end(call)

    def make_room(self) -> bool:
        nodes = self._usable()
        larger = self.share.with_room(len(self.actors), nodes)
        if self.fixed or larger == self.share:
            return False
        told = f"from now on each actor has {larger.times(1)}, so that fewer share the memory"
        self._note(Cause.MEMORY, told, share=larger._asdict())  # read when the run is resumed
        self.share = larger
        self.close()
        for actor in self.actors:
            self._logs.keep(actor.log)
        self.actors.clear()
        self._add(min(self.most, room(larger, nodes)), nodes)
        return True

    def losses(self) -> list[Row]:
        losses, self._losses = self._losses, []
        return losses

    def usage(self) -> dict[str, Row]:
        return self._crossing.usage()

    def _usable(self) -> dict[str, Resources]:
        """Return what each node has of those that actors may be on; ones that are drained only if there is no other."""
        nodes = {node: have for node, have in alive(self.config.node_label).items() if node not in self._unfit}
        staying = {node: have for node, have in nodes.items() if node not in draining()}
        if self._grouped or not room(self.share, staying):
            staying = nodes
        self._leaving = frozenset(nodes.keys() - staying.keys())
        return staying

    def _fits_in(self, actor: Actor) -> bool:
        """Tell whether an actor has the versions of this process; else do without it, and without its node.

        Raises:
            UserError: there is no other actor.
        """
        if not (differs := difference(actor.place.versions)):
            return True
        node = actor.place.node[:SHORT]
        if len(self.actors) == 1:
            raise UserError(f"node {node} has {differs}; install the same versions on all nodes.")
        self._unfit.add(actor.place.node)
        self._drop(actor, Cause.START, f"is on node {node}, which has {differs}, and is not used")
        return False

    def printed(self, last: bool = False) -> dict[str, str]:
        if last:
            with suppress(RayError):  # a cluster that is gone
                self._look(1.0)
        return self._logs.take(actor.log for actor in self.actors)

    def _note(self, cause: Cause, reason: str, **more: Any) -> None:
        loss = {"clients": [], "cause": cause, "reason": reason, "seconds": 0.0, "actor": False}
        self._losses.append(loss | more)

    @property
    def _settings(self) -> Config:
        return replace(self.config, gpus_per_actor=self.share.gpus)

    def _make(self, index: int, node: str | None = None) -> Any:
        """Make a client actor, by its number; on a node, if one is given."""
        options = make_options(*self.share, *(() if self._grouped else (node, self.config.node_label)))
        return self._class.options(**options).remote(self._settings, index, *_data(self.dataset), self.run)

    def _add(self, number: int, nodes: Mapping[str, Resources]) -> None:
        """Add so many actors, under numbers that are free, on these nodes."""
        places = assign(self.share, free(nodes), self._crossing.here, number)
        for node in [*places, *[None] * (number - len(places))]:
            index = next(index for index in count() if index not in {actor.index for actor in self.actors})
            self.actors.append(Actor(index, self._make(index, node)))

    def _drop(self, actor: Actor, cause: Cause, reason: str) -> None:
        """Go on without an actor."""
        ray.kill(actor.handle)
        self._logs.keep(actor.log)
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
        if 1 < len(self.actors) > room(self.share, self._usable()):
            self._drop(actor, lost.cause, "is not made again, as no node has room for it")
        else:
            wait = actor.back_off.wait(lost.cause)
            actor.end(wait)
            if wait:
                many = actor.back_off.ended
                self._note(lost.cause, f"{many} processes in a row ended as {actor}; the next is made in {wait:g} s")

    def _make_again(self) -> None:
        """Make the actors whose time has come."""
        for actor in [actor for actor in self.actors if actor.due]:
            actor.make(self._make(actor.index, *assign(self.share, free(self._usable()), self._crossing.here, 1)))

    def _fit(self, nodes: Mapping[str, Resources], busy: Collection[Actor]) -> None:
        """Have as many actors as there is room for: more where a node has joined, fewer where one has gone.

        Args:
            nodes: that actors may be on.
            busy: actors that have a job.

        Raises:
            RunError: none could start in time.
        """
        waiting = [actor for actor in self.actors if not actor.started]
        slots, timeout = room(self.share, nodes), self.config.start_timeout
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
        leaving = [actor for actor in self.actors if actor.place.node in self._leaving]
        missing = min(self.most, slots) - (len(self.actors) - len(leaving))
        if missing > 0 and not waiting:
            self._add(min(missing, room(self.share, free(nodes))), nodes)
        for actor in leaving if len(self.actors) > len(leaving) else ():
            if actor not in busy:
                self._drop(actor, Cause.PREEMPTION, f"leaves node {actor.place.node[:SHORT]}, which is being drained")

    def _staying(self, actors: list[Actor]) -> list[Actor]:
        """Return those that are not on a node that is being drained; all, where nobody else is."""
        if all(actor.place.node in self._leaving for actor in self.actors):
            return list(actors)
        return [actor for actor in actors if actor.place.node not in self._leaving]

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


@contextmanager
def open_pool(config: Config, dataset: Dataset | None = None, run: str = "") -> Iterator[Pool]:
    """Open the pool that the configuration asks for, and close it after the block."""
    if config.actors == 0:
        yield LocalPool(config, dataset)
        return
    with connected(config.address):
        check_versions(config.node_label)
        pool = RayPool.start(config, dataset, run=run)
        try:
            yield pool
        finally:
            pool.close()

"""What crosses between the driver's node and others: jobs and payloads, and one partial of each node.

A partial stays on the node that made it; the next job there goes on with it. At the end of a map an actor of the node
merges what is left, and one partial crosses. The bits are those of any other order, since a fold is a monoid.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.experimental import get_local_object_locations

from fedray.cluster.calls import Actor, Call, Held
from fedray.cluster.ends import explain
from fedray.cluster.messages import pack, unpack
from fedray.cluster.nodes import SHORT, alive
from fedray.federation.causes import BLAMELESS, Cause, Lost
from fedray.federation.pool import Reply
from fedray.federation.worker import Parts, Shared
from fedray.record.run import Row

TRANSFER_TIMEOUT = 600.0  # seconds for one payload to reach the driver


class Crossing:
    """Brings what jobs return to the driver's process, keeps account of what lies on other nodes, and counts bytes."""

    def __init__(self) -> None:
        self.here = ray.get_runtime_context().get_node_id()
        self._held: defaultdict[str, list[Held]] = defaultdict(list)  # by node
        self._counted: defaultdict[str, Counter[str]] = defaultdict(Counter)  # by node
        self._waited: defaultdict[str, float] = defaultdict(float)  # seconds, by node
        self._reached: dict[str, set[str]] = {}  # by object that was put, the nodes that have had a copy

    @property
    def nodes(self) -> list[str]:
        """The nodes that hold partials."""
        return [node for node, held in self._held.items() if held]

    def endangered(self, leaving: Collection[str], busy: Iterable[Actor]) -> list[str]:
        """List the nodes that hold partials, and have gone, or are to go and have no actor that is busy."""
        working, living = {actor.place.node for actor in busy}, alive()
        return [node for node in self.nodes if node not in living or (node in leaving and node not in working)]

    def drop(self) -> None:
        """Forget what an earlier map has left that was broken off."""
        self._held.clear()

    def begin(self, actor: Actor, job: Any, shared: Shared) -> Held | None:
        """Take note of a job that an actor is given; return the partial on its node that it goes on with."""
        self.rest(actor)
        node = actor.place.node
        if node == self.here:
            return None
        self._counted[node]["bytes_to"] += pack(job).nbytes
        return self._held[node].pop() if shared.merge is not None and self._held[node] else None

    def rest(self, *actors: Actor) -> None:
        """Take note of how long actors have waited until now."""
        for actor in actors:
            self._waited[actor.place.node] += time.monotonic() - actor.rests

    def open(self, call: Call, shared: Shared) -> Any:
        """Bring a job's payload; its partial stays on its node if it can be merged there. Raises `Lost`."""
        payload = self._bring(call.payload, str(call.job), call.place.node)
        if not isinstance(payload, Parts):
            return payload
        if shared.merge is None or call.place.node == self.here:
            return payload._replace(partial=self._bring(call.partial, str(call.job), call.place.node, "partials"))
        held = Held(call.partial, payload.keys + (call.onto.keys if call.onto else ()))
        if held.keys:
            self._held[call.place.node].append(held)
        call.onto = None
        return payload

    def end(self, call: Call) -> None:
        """Keep the partial that a job has not gone on with after all: it failed, or its reply was not fetched."""
        if call.onto is not None:
            self._held[call.place.node].append(call.onto)

    def gather(self, nodes: Iterable[str], actors: Iterable[Actor], about: Any) -> Iterator[Reply]:
        """Bring what lies on these nodes, merged there to one partial each; or tell that it is lost.

        What was merged is kept until the merged one is here: if the actor that merges is lost, each comes by itself.

        Args:
            about: the `Shared` inputs of the map, without arrays.
        """
        at = {actor.place.node: actor for actor in actors}
        whole: dict[Any, tuple[str, list[Held]]] = {}
        for node in nodes:
            held = self._held.pop(node)
            if len(held) > 1 and node in at:
                whole[at[node].handle.merge.remote(about, *(each.ref for each in held))] = node, held
            else:
                whole |= {each.ref: (node, [each]) for each in held}
        while whole:
            ready, _ = ray.wait(list(whole), timeout=TRANSFER_TIMEOUT)  # and all are on their way
            for ref in ready or list(whole):
                node, held = whole.pop(ref)
                keys = tuple(key for each in held for key in each.keys)
                try:
                    merged = self._bring(ref, f"the partial of node {node[:SHORT]}", node, "partials")
                    yield Reply(-1, None, {}, partial(_same, merged), holds=keys)
                except Lost as lost:
                    if len(held) > 1 and lost.cause not in BLAMELESS:
                        whole |= {each.ref: (node, [each]) for each in held}
                    else:
                        yield Reply(-1, None, {}, partial(_same, None), str(lost), lost.cause, keys)

    def look(self, about: Any, arrays: list[Any]) -> None:
        """Count the copies of a map's inputs, where Ray says they are; an object reaches a node once.

        Args:
            arrays: all that were put and are kept, also of maps before.
        """
        places = get_local_object_locations([about, *arrays])
        self._reached = {ref.hex(): self._reached.get(ref.hex(), {self.here}) for ref in places}
        for ref, place in places.items():
            reached = self._reached[ref.hex()]
            for node in set(place["node_ids"]) - reached:
                self._counted[node].update(bytes_to=place["object_size"], copies=int(ref != about))
            reached.update(place["node_ids"])

    def usage(self) -> dict[str, Row]:
        """Return, by node, what was counted since the last time."""
        counted, self._counted = self._counted, defaultdict(Counter)
        waited, self._waited = self._waited, defaultdict(float)
        names = ("bytes_to", "bytes_from", "copies", "partials")
        return {
            node[:SHORT]: {"waiting": waited[node]} | {name: counted[node][name] for name in names}
            for node in sorted({*counted, *waited})
        }

    def _bring(self, ref: Any, what: str, node: str, counted: str = "") -> Any:
        message = fetch(ref, what, node)
        if node != self.here:
            self._counted[node].update(bytes_from=message.nbytes, **({counted: 1} if counted else {}))
        return unpack(message)


def _same(value: Any) -> Any:
    return value


def fetch(ref: Any, what: str, node: str, log: str = "") -> Any:
    """Bring a result to this process. Raises `Lost` if the actor that made it died, or it does not come."""
    try:
        return ray.get(ref, timeout=TRANSFER_TIMEOUT)
    except GetTimeoutError:
        raise Lost(f"the result of {what} did not arrive in {TRANSFER_TIMEOUT:.0f} s", Cause.DEADLINE) from None
    except RayError as error:
        raise explain(error, node, log) from None

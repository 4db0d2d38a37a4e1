"""What the pool knows of its client actors and of the jobs that these are doing."""

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray._private.state import actors as known_to_ray
from ray.exceptions import RayError

from fedray.cluster.actors import Place
from fedray.cluster.ends import explain
from fedray.cluster.logs import Log
from fedray.federation.causes import BackOff
from fedray.federation.worker import Done, Key

ARRIVE = 30.0  # seconds for a small result that is ready to reach this process


class Held(NamedTuple):
    """A partial on a node: an object of Ray's that the driver owns, and the keys of the jobs that it is made of."""

    ref: Any
    keys: tuple[Key, ...]


class Actor:
    """A client actor, the one that replaced it, and so on; and what it was last seen to have done."""

    def __init__(self, index: int, handle: Any) -> None:
        self.index = index
        self.log = Log(f"actor-{index}")
        self.handle = handle
        self.ready = handle.place.remote()
        self.began = time.monotonic()
        self.place = Place("", "", {})
        self.rests = self.began  # since when it has had no job
        self.done = Done(0, 0)
        self.before = Done(0, 0)  # what those that it replaced had done
        self.back_off = BackOff()
        self.waits = False  # for its next process to be made, until `began`
        self._asked: Any = None

    def __str__(self) -> str:
        return f"actor {self.index}"

    @property
    def started(self) -> bool:
        return bool(self.place.node)

    def start(self, timeout: float = ARRIVE) -> "Actor":
        """Take note of where it is, once it is ready. Raises `Lost` if it was killed meanwhile, or cannot be made."""
        try:
            self.place = ray.get(self.ready, timeout=timeout)
        except RayError as error:
            raise explain(error) from None
        self.log.begin(self.place.node, self.place.log)
        return self

    @property
    def has_its_share(self) -> bool:
        """Whether it has been given its share of a node, be it that its process is not ready."""
        return self.started or not self.waits and bool(known_to_ray(self.handle._actor_id.hex()).get("Pid"))

    def end(self, wait: float) -> None:
        """End its process, if there still is one. It is to be made again in so many seconds."""
        ray.kill(self.handle)
        self.log.end()
        self.before, self.place, self._asked = self.done, Place("", "", {}), None
        self.waits, self.began = True, time.monotonic() + wait

    @property
    def due(self) -> bool:
        """Whether it is time to make it again."""
        return self.waits and time.monotonic() >= self.began

    def make(self, handle: Any) -> None:
        """Go on with a new process."""
        self.handle, self.ready, self.waits, self.began = handle, handle.place.remote(), False, time.monotonic()

    def rest(self) -> "Actor":
        """Take note that it has no job from now on."""
        self.rests = time.monotonic()
        return self

    def ask(self) -> Any:
        """Ask what it has done, unless an answer is still due."""
        self._asked = self._asked or self.handle.progress.remote(self.log.read)
        return self._asked

    def hear(self) -> None:
        """Take note of its answer."""
        with suppress(RayError):  # one that died: its job will tell
            done, printed = ray.get(self._asked, timeout=ARRIVE)
            self.log.hear(printed)
            self.done = Done(self.before.steps + done.steps, self.before.clients + done.clients)
        self._asked = None


@dataclass
class Call:
    """A job that an actor is doing."""

    index: int
    job: Any
    payload: Any
    partial: Any  # apart from the payload: it may stay on the actor's node
    onto: Held | None  # the partial there that it goes on with
    actor: Actor
    deadline: float  # for the next client
    clients: int = field(init=False)  # that the actor had done when it was looked at
    place: Place = field(init=False)  # where the actor is

    def __post_init__(self) -> None:
        self.clients, self.place = self.actor.done.clients, self.actor.place

    def overdue(self, timeout: float) -> bool:
        """Tell whether the deadline has passed; it is set anew when another client is done."""
        if self.actor.done.clients > self.clients:
            self.clients, self.deadline = self.actor.done.clients, time.monotonic() + timeout
        return time.monotonic() > self.deadline

"""Where the seconds of a round go: its process does one thing at a time, so the parts sum to the round."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Clock:
    """Counts the seconds of a round by what its process did, or waited for.

    training: it waited, and clients trained (mean over the workers);  transfer: it waited, and jobs and results were
    underway, or it fetched results;  waiting: it waited, and workers had no job, or were not there yet;  fold: it
    merged partials and kept memories;  server: it did the server's half of the algorithm and of the wire;  record: it
    showed the rounds before.
    """

    def __init__(self) -> None:
        self._parts = dict.fromkeys(("clients", "transfer", "fold", "server", "record"), 0.0)
        self._part, self._began = "server", time.perf_counter()
        self._since = self._began
        self._worked = self._underway = 0.0  # of all workers, added up

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Count what the block takes as this part."""
        before = self._turn(part)
        try:
            yield
        finally:
            self._turn(before)

    def during(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """Count what it takes to get the next item as this part."""
        taken = iter(items)
        while True:
            with self.on(part):
                item = next(taken, None)
            if item is None:
                return
            yield item

    def _turn(self, part: str) -> str:
        now, before = time.perf_counter(), self._part
        self._parts[before] += now - self._since
        self._part, self._since = part, now
        return before

    def job(self, worked: float, took: float) -> None:
        """Take note of a job: the seconds that its worker worked, and those from when it was given to its reply."""
        self._worked += worked
        self._underway += max(0.0, took - worked)

    def seconds(self, workers: int) -> dict[str, float]:
        """Return the parts until now, and "round", their sum."""
        self._turn(self._part)
        clients = self._parts["clients"]
        training = min(clients, self._worked / max(1, workers))
        underway = min(clients - training, self._underway / max(1, workers))
        return {
            "training": training,
            "waiting": clients - training - underway,
            "transfer": self._parts["transfer"] + underway,
            **{part: self._parts[part] for part in ("fold", "server", "record")},
            "round": self._since - self._began,
        }

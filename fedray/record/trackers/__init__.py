"""Trackers show a run's rows elsewhere. The rows are the record: a tracker is made of them, at any time anew."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Protocol

from fedray.errors import reason
from fedray.record.run import Row, Run


class Tracker(Protocol):
    """Somewhere that the rows of a run are shown, as curves for instance. It may raise: the run goes on without it."""

    def restart(self, rows: Iterable[Row]) -> None:
        """Show these rows and no others: of a run that begins, or goes on, or after `add` has failed."""

    def add(self, row: Row) -> None:
        """Show one more row, at once: the run may be killed before the next."""


class Trackers:
    """The trackers of a run. What fails there is warned of, and made good from the rows when the next one comes."""

    def __init__(self, run: Run, trackers: Sequence[Tracker]) -> None:
        self.run = run
        self.trackers = trackers
        self.behind = set(trackers)  # to be restarted
        self.warned = set[Tracker]()
        self.add()

    def add(self, *rows: Row) -> None:
        """Show rows that are durable: the last of rounds.jsonl."""
        for tracker in self.trackers:
            try:
                if tracker in self.behind:
                    tracker.restart(self.run.rows)
                else:
                    for row in rows:
                        tracker.add(row)
                self.behind.discard(tracker)
            except Exception as error:
                self.behind.add(tracker)
                if tracker not in self.warned:
                    name = type(tracker).__name__
                    warnings.warn(f"{name} shows no new rounds for now: {reason(error)}.", stacklevel=2)
                    self.warned.add(tracker)

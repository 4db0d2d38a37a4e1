"""Checkpoints, written beside the next round: a state is never changed in place, so that none is copied."""

import copy
import time
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from fedray.record.checkpoint import State
from fedray.record.run import Row, Run
from fedray.vector import Layout


class Saver:
    """Writes one checkpoint at a time. The order is: memories, checkpoint, rows; a row is final once that is durable.

    Rows of rounds that have no checkpoint of their own wait for the next.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: list[Row] = []  # since the last durable checkpoint, when nothing will change them
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._waited = 0.0  # seconds, for it

    def begin(self, state: State, row: Row, layout: Layout, limit: int) -> None:
        """Begin to write the checkpoint of a complete round, with its row as it is now, and those that wait for it."""
        rows, self._waited = copy.deepcopy([*self.rows, row]), 0.0
        self._writing = self._thread.submit(self.run.complete, state, rows, layout, limit)

    def recovered(self, rows: list[Row]) -> None:
        """Take up rows of a checkpoint that is durable; the last of its rows is yet to come."""
        self.rows = rows
        self._writing = Future()
        self._writing.set_result(None)

    def durable(self, wait: float = 0.0) -> bool:
        """Tell whether rows wait that may be shown, after at most `wait` seconds."""
        if self._writing is None or not self.rows:
            return False
        began = time.perf_counter()
        done = futures.wait([self._writing], wait).done
        self._waited += time.perf_counter() - began if wait else 0.0
        return bool(done)

    def finish(self) -> list[Row]:
        """Wait until the checkpoint is durable; write its rows, and return them; none where none is being written."""
        if self._writing is None or not self.rows:
            return []
        began = time.perf_counter()
        rows, writing = self.rows, self._writing
        self.rows, self._writing = [], None
        writing.result()
        rows[-1]["seconds"]["save"] = self._waited + time.perf_counter() - began
        self.run.append(rows)
        return rows

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """However the run ends: a round that is complete has its checkpoint and its row."""
        self._thread.shutdown()
        if error is not None and self.durable() and self._writing is not None and not self._writing.exception():
            self.finish()

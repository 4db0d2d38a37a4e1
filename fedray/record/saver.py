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
    """Writes one checkpoint at a time. The order is: memories, checkpoint, row; a row is final once that is durable."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.row: Row | None = None  # of the round whose checkpoint is being written, when nothing will change it
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, state: State, row: Row, layout: Layout, limit: int) -> None:
        """Begin to write the checkpoint of a complete round, with its row as it is now."""
        self._writing = self._thread.submit(self.run.complete, state, copy.deepcopy(row), layout, limit)

    def durable(self, wait: float = 0.0) -> bool:
        """Tell whether a row waits that may be shown, after at most `wait` seconds."""
        if self.row is None:
            return False
        return self._writing is None or bool(futures.wait([self._writing], wait).done)

    def finish(self) -> Row | None:
        """Wait until the checkpoint is durable; write its row, and return it; None where none is being written."""
        row, writing = self.row, self._writing
        if row is None:
            return None
        began = time.perf_counter()
        self.row = self._writing = None
        if writing is not None:
            writing.result()
            row["seconds"]["save"] = time.perf_counter() - began
        self.run.append(row)
        return row

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """However the run ends: a round that is complete has its checkpoint and its row."""
        self._thread.shutdown()
        if error is not None and self.durable():
            self.finish()

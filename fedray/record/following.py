"""A run that another process does: whether it goes on, what it has done, and asking it to stop.

All of it goes by the run's directory or URL, so it is the same for a run in a process, on a private Ray and on a
cluster.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedray.errors import RunError, UserError
from fedray.files import LOCK, is_locked
from fedray.record.copies import local, written
from fedray.record.manifests import STOP
from fedray.record.run import Row, Run
from fedray.storage import Store, discard, upload, url_of

EVERY = 1.0  # seconds between looks at a directory
REMOTE = 5.0  # seconds between looks at a storage

Show = Callable[[str, float, float], None]


def goes_on(run: Run) -> bool:
    """Tell whether a process writes the run; of one at a URL, as far as this node's copy of it knows."""
    return is_locked(run.directory / LOCK) or written(run.directory)


def follow(run: Run) -> Iterator[list[Row]]:
    """Yield the rows of a run that have come since the last look, until nobody writes it."""
    seen, going, url = 0, True, url_of(run.directory)
    while going:
        if url is not None:
            local(url)
        going = goes_on(run)  # looked at first: rows that came before its end are not missed
        rows = run.rows[seen:]
        seen += len(rows)
        yield rows
        if going:
            time.sleep(EVERY if url is None else REMOTE)


def ask_to_stop(run: Run) -> None:
    """Ask the process that writes the run to stop. It drops the round that it is at."""
    (run.directory / STOP).touch()
    upload(run.directory / STOP)


@contextmanager
def stoppable(run: Run, show: Show) -> Iterator[Show]:
    """Yield a `show` that ends the run, with a `RunError`, once it is asked to stop."""
    path, url, looked, looked_there = run.directory / STOP, url_of(run.directory), 0.0, 0.0
    _withdraw(path)  # it asked a process that had ended

    def asked() -> bool:
        nonlocal looked_there
        if url is None or time.monotonic() < looked_there + REMOTE:
            return False
        looked_there = time.monotonic()
        with suppress(UserError):  # for now it cannot be reached
            return Store(url).exists(STOP)
        return False

    def watched(phase: str, done: float, total: float) -> None:
        nonlocal looked
        if time.monotonic() >= looked + EVERY:  # on network storage a look takes milliseconds
            looked = time.monotonic()
            if path.exists() or asked():
                raise RunError("stopped, as `fedray stop` asked; its complete rounds are kept.")
        show(phase, done, total)

    try:
        yield watched
    finally:
        _withdraw(path)


def _withdraw(path: Path) -> None:
    with suppress(UserError):  # a storage that cannot be reached just now
        discard(path)

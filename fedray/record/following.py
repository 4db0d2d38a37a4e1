"""A run that another process does: whether it goes on, what it has done, and asking it to stop.

All of it goes by the run's directory, so it is the same for a run in a process, on a private Ray and on a cluster.
"""

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedray.errors import RunError
from fedray.files import LOCK
from fedray.record.run import Row, Run

STOP = "stop"  # a file in a run's directory: it is asked to stop
EVERY = 1.0  # seconds between looks at a directory

Show = Callable[[str, float, float], None]


def goes_on(run: Run) -> bool:
    """Tell whether a process holds the run's directory (`Run.locked`)."""
    try:
        with open(run.directory / LOCK) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # of a run of an older version
        return False
    except BlockingIOError:
        return True
    return False


def follow(run: Run) -> Iterator[list[Row]]:
    """Yield the rows of a run that have come since the last look, about every second, until nobody writes it."""
    seen, going = 0, True
    while going:
        going = goes_on(run)  # looked at first: rows that came before its end are not missed
        rows = run.rows[seen:]
        seen += len(rows)
        yield rows
        if going:
            time.sleep(EVERY)


def ask_to_stop(run: Run) -> None:
    """Ask the process that holds the run to stop. It drops the round that it is at."""
    (run.directory / STOP).touch()


@contextmanager
def stoppable(run: Run, show: Show) -> Iterator[Show]:
    """Yield a `show` that ends the run, with a `RunError`, once it is asked to stop."""
    path, next_look = run.directory / STOP, 0.0
    path.unlink(missing_ok=True)  # it asked a process that had ended

    def watched(phase: str, done: float, total: float) -> None:
        nonlocal next_look
        if time.monotonic() >= next_look:  # on network storage a look takes milliseconds
            next_look = time.monotonic() + EVERY
            if path.exists():
                raise RunError("stopped, as `fedray stop` asked; its complete rounds are kept.")
        show(phase, done, total)

    try:
        yield watched
    finally:
        path.unlink(missing_ok=True)

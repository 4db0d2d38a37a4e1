"""logs/ of a run: what its processes print, a file for each: actor-0.log, driver.log."""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from fedray.record.following import EVERY, Show
from fedray.record.run import Run

MOST = 1_000_000  # bytes of a file; then it is NAME.log.1, in place of the one before


@contextmanager
def logged(run: Run, printed: Callable[[bool], Mapping[str, str]], show: Show) -> Iterator[Show]:
    """Yield a `show` that writes what was printed to the run's logs, about every second; so does the end of the block.

    A resumed run goes on with the files that are there: they tell why it had ended.

    Args:
        printed: of the pool; whether it is the last time.
    """
    next_look = 0.0

    def watched(phase: str, done: float, total: float) -> None:
        nonlocal next_look
        if time.monotonic() >= next_look:
            next_look = time.monotonic() + EVERY
            write(run, printed(False))
        show(phase, done, total)

    try:
        yield watched
    finally:
        write(run, printed(True))


def write(run: Run, printed: Mapping[str, str]) -> None:
    """Write what processes have printed, by their names. A log that cannot be written ends no run."""
    directory = run.directory / "logs"
    for name, text in printed.items():
        path = directory / f"{name}.log"
        with suppress(OSError):
            directory.mkdir(exist_ok=True)
            if path.exists() and path.stat().st_size > MOST:
                os.replace(path, directory / f"{name}.log.1")
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            with open(file, "w", encoding="utf-8") as opened:
                opened.write(text)

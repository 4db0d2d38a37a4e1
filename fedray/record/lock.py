"""The lock of a run's directory, which its process holds: two must not write the same run."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedray.errors import UserError
from fedray.files import LOCK, remove_leftovers
from fedray.storage import shown


@contextmanager
def hold(directory: Path, patience: float) -> Iterator[None]:
    """Hold a directory, which is made if need be.

    Args:
        patience: seconds to wait for another process: one that was just killed may need a moment.

    Raises:
        UserError: another process holds it, it cannot be written, or has a folder that is a link.
    """
    deadline = time.monotonic() + patience
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise unwritable(directory, error) from None
    try:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    what = f"{shown(directory)} is being written by another process; wait for it."
                    raise UserError(what) from None
            time.sleep(0.1)
        _check_links(directory)
        remove_leftovers(directory)
        yield
    finally:
        os.close(file)


def unwritable(directory: Path, error: OSError) -> UserError:
    """Say that a run cannot be written where it should be."""
    return UserError(f"{shown(directory)} cannot be written: {error.strerror}; choose another --out.")


def _check_links(directory: Path) -> None:
    """Raise `UserError` for a folder that is a link: what lies elsewhere would be changed. Files are replaced."""
    for folder, below, _ in os.walk(directory):
        for path in (Path(folder, name) for name in below):
            if path.is_symlink():
                raise UserError(f"{path} is a link, which a run does not write through; put a folder in its place.")

"""A per-node cache, and atomic writes. Each entry is a directory, built in a temporary one and renamed."""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fedray.errors import UserError

ASIDE = ".part"  # how temporary files' names end

PATIENCE = 3.0  # seconds to wait for another process before saying so
LOCK_TIMEOUT = 86_400.0  # seconds to wait for another process that makes the same entry


def home() -> Path:
    """Return the cache's directory: $FEDRAY_CACHE, else fedray in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEDRAY_CACHE") or Path(base) / "fedray").absolute()


def kept(what: str, key: object, make: Callable[[Path], None]) -> Path:
    """Return the directory of an entry; `make` fills it, unless it is cached already.

    Safe if a maker is killed, or if two start at once: one makes the entry, the other waits.

    Args:
        what: describes the work, for messages.
        key: JSON that changes whenever the entry would.

    Raises:
        UserError: another process has held the entry for a day.
    """
    place = home() / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    with _locked(place.with_suffix(".lock"), what):
        if not place.exists():
            aside = place.with_suffix(".aside")
            shutil.rmtree(aside, ignore_errors=True)  # a maker that was killed left it
            aside.mkdir(parents=True)
            try:
                make(aside)
                aside.rename(place)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return place


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Lock an entry for one maker at a time; the kernel frees the lock of a killed process."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}); set FEDRAY_CACHE to a directory that can."
        ) from None
    began, told = time.monotonic(), False
    with file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waited = time.monotonic() - began
                if waited > PATIENCE and not told:
                    Console(stderr=True).print(f"{what}: waiting for another process that is at it", highlight=False)
                    told = True
                if waited > LOCK_TIMEOUT:
                    raise UserError(
                        f"{what}: another process has been at it for {LOCK_TIMEOUT / 3600:g} hours; end that "
                        f"process, or set FEDRAY_CACHE to another directory."
                    ) from None
                time.sleep(0.2)
        yield


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file. Raises `UserError` if it is damaged."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged at line {error.lineno}: {error.msg}.") from None


def as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, default=str) + "\n"  # str: what a user's own task is configured with


def write(path: Path, text: str) -> None:
    """Write a text file: complete or not at all, and on the disk when this returns."""
    with durably(path) as aside:
        aside.write_text(text)


@contextmanager
def durably(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to; then flush it, rename it to `path`, and flush its directory."""
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
    try:
        yield aside
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_content(path: Path) -> bool:
    """Tell whether a file is more than what a killed process left of one."""
    return not (path.name.startswith(".") and path.name.endswith(ASIDE))


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files below a directory that killed processes left."""
    for aside in directory.rglob(f".*{ASIDE}"):
        aside.unlink(missing_ok=True)

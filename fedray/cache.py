"""A per-node cache. Each entry is a directory, built in a temporary one, sealed with its files' sums, and renamed.

It is the user's own: entries can be read by nobody else, and one that somebody else made is refused.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from fedray.errors import UserError
from fedray.files import LOCK, flush, is_locked

FORMAT = 2  # of entries: 1 had no sums
SEAL = "seal.json"  # in each entry: what it is, and its files' sums; it is touched when those are checked
ASIDE = ".aside"  # how the name of an entry ends that is being made
COPIES = "storage"  # the directory of copies of what URLs name (`fedray.storage`); below it, one for each kind: `s3:`
KNOWN = f"{COPIES}-known"  # what is known of copies of runs: copy.json, and a lock, in a directory for each

PATIENCE = 3.0  # seconds to wait for another process before saying so
LOCK_TIMEOUT = 86_400.0  # seconds to wait for another process that makes the same entry
TRUSTED = 3_600.0  # seconds for which actors rely on a check by another process of their node
CHUNK = 2**22  # bytes that a thread hashes at a time


class Entry(NamedTuple):
    """An entry of the cache, for a list of them."""

    path: Path
    what: str
    size: int  # bytes
    used: float  # seconds since the epoch


def home() -> Path:
    """Return the cache's directory: $FEDRAY_CACHE, else fedray in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("FEDRAY_CACHE") or Path(base) / "fedray").absolute()


def place_of(key: object) -> Path:
    """Return the directory that an entry of that key has, or would have."""
    return home() / hashlib.sha256(json.dumps([FORMAT, key]).encode()).hexdigest()[:24]


def kept(what: str, key: object, make: Callable[[Path], None]) -> Path:
    """Return the directory of an entry; `make` fills it, unless it is cached already.

    All files of a cached entry are read and compared with their sums each time: once per entry and run, in the process
    that begins the run, at the speed of the disk or of SHA-256 on all cores (some 1 GB/s each). One that is damaged is
    made again, and that is said. A run's actors on the same node do not do it again (`is_whole`).

    Safe if a maker is killed, or if two start at once: one makes the entry, the other waits.

    Args:
        what: describes the work, for messages.
        key: JSON that changes whenever the entry would.

    Raises:
        UserError: another process has held the entry for a day, or another user made it.
    """
    place = place_of(key)
    with locked(place, what):
        if os.path.lexists(place):
            check_owner(place)
            damaged = _damage(place)
            if damaged:
                say(f"{what}: {damaged} in the cache is damaged; it is made again")
                shutil.rmtree(place)
        if not place.exists():
            aside = place.with_suffix(ASIDE)
            shutil.rmtree(aside, ignore_errors=True)  # a maker that was killed left it
            aside.mkdir(mode=0o700)
            try:
                make(aside)
                _seal(aside, what)
                aside.rename(place)
                flush(place.parent)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return place


def is_whole(place: Path) -> bool:
    """Tell whether an entry is there and undamaged.

    Its files are read, unless a process of this node has done so in the last hour: the actors of a node share that.
    """
    if not place.is_dir():
        return False
    with locked(place, "checking the cache"):
        try:
            check_owner(place)
            if 0 <= time.time() - (place / SEAL).stat().st_mtime < TRUSTED:
                return True
            return not _damage(place)
        except OSError:  # it was removed meanwhile
            return False


def entries() -> list[Entry]:
    """List the entries, those used last first; also copies of runs, and what older versions and killed makers left."""
    found = []
    for path in home().iterdir() if home().is_dir() else ():
        if path.is_symlink() or not path.is_dir() or not _is_name(path.name):
            continue
        try:
            size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
            seal = path / SEAL
            used = (seal if seal.is_file() else path).stat().st_mtime
            what = json.loads(seal.read_text())["what"] if seal.is_file() else "of an older version, or not complete"
        except (OSError, ValueError, KeyError, TypeError):
            size, used, what = 0, 0.0, "damaged"
        found.append(Entry(path, str(what), size, used))
    for known in (home() / KNOWN).rglob("copy.json"):
        name = known.parent.relative_to(home() / KNOWN)
        path = home() / COPIES / name
        size = sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
        found.append(
            Entry(path, f"copy of the run {name.parts[0]}//{'/'.join(name.parts[1:])}", size, known.stat().st_mtime)
        )
    return sorted(found, key=lambda entry: -entry.used)


def remove(entry: Entry) -> bool:
    """Remove an entry, unless another process is making or checking it. What has it mapped goes on undisturbed."""
    if entry.path.is_relative_to(home() / COPIES):
        if is_locked(entry.path / LOCK):  # a process writes the run
            return False
        for place in (entry.path, home() / KNOWN / entry.path.relative_to(home() / COPIES)):
            shutil.rmtree(place, ignore_errors=True)
        return True
    try:
        with locked(entry.path, entry.what, wait=False) as lock:
            shutil.rmtree(entry.path)
            lock.unlink()
    except BlockingIOError:
        return False
    return True


def _is_name(name: str) -> bool:
    """Tell whether a name in the cache is one that `kept` gives: other directories are not ours to list or remove."""
    digits = name.removesuffix(ASIDE)
    return len(digits) == 24 and not set(digits) - set("0123456789abcdef")


def check_owner(place: Path) -> None:
    """Raise `UserError` for an entry that another user may have made, or for a link."""
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or (os.geteuid() and found.st_uid not in (0, os.geteuid())):
        raise UserError(
            f"{place} in the cache is not a directory of yours; remove it, or set FEDRAY_CACHE to a directory that "
            f"only you can write to."
        )


def _seal(place: Path, what: str) -> None:
    """Note the sums of an entry's files, and have all on the disk."""
    sums = {name: [(place / name).stat().st_size, _sum(place / name)] for name in _files(place)}
    (place / SEAL).write_text(json.dumps({"what": what, "files": sums}))
    for path in [*(place / name for name in _files(place)), place / SEAL, place]:
        flush(path)


def _damage(place: Path) -> str:
    """Name the first file that is not as it was sealed; "" where all are."""
    try:
        sums = json.loads((place / SEAL).read_text())["files"]
        if sorted(sums) != _files(place):
            return SEAL
        for name, (size, digest) in sums.items():
            path = place / name
            if path.stat().st_size != size or _sum(path) != digest:
                return name
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return SEAL
    os.utime(place / SEAL)
    return ""


def _files(place: Path) -> list[str]:
    return sorted(
        path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file() and path != place / SEAL
    )


def _sum(path: Path) -> str:
    """Return the SHA-256 of the SHA-256s of a file's chunks, which several threads read and hash."""

    with open(path, "rb") as file:

        def digest(start: int) -> bytes:
            return hashlib.sha256(os.pread(file.fileno(), CHUNK, start)).digest()

        starts = range(0, path.stat().st_size, CHUNK)
        if len(starts) < 2:
            return hashlib.sha256(b"".join(map(digest, starts))).hexdigest()
        with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1)) as threads:
            return hashlib.sha256(b"".join(threads.map(digest, starts))).hexdigest()


@contextmanager
def locked(place: Path, what: str, wait: bool = True, shared: bool = False) -> Iterator[Path]:
    """Lock an entry for one process at a time; the kernel frees the lock of a killed one. Yields the lock's file.

    Args:
        wait: for another process that has it, at most a day.
        shared: with all that ask so, and nobody else.

    Raises:
        BlockingIOError: another process has it, and we should not wait.
    """
    path = place.with_suffix(LOCK)
    began, told = time.monotonic(), False
    while (file := _open_locked(path, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)) is None:
        if not wait:
            raise BlockingIOError(f"{path} is held by another process")
        waited = time.monotonic() - began
        if waited > PATIENCE and not told:
            say(f"{what}: waiting for another process that is at it")
            told = True
        if waited > LOCK_TIMEOUT:
            raise UserError(
                f"{what}: another process has been at it for {LOCK_TIMEOUT / 3600:g} hours; end that "
                f"process, or set FEDRAY_CACHE to another directory."
            )
        time.sleep(0.2)
    try:
        yield path
    finally:
        os.close(file)


def _open_locked(path: Path, kind: int) -> int | None:
    """Open a lock's file and lock it, shared or exclusively; None where another process has it."""
    file = _open_lock(path)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        if path.exists() and os.fstat(file).st_ino == path.stat().st_ino:  # else it was removed meanwhile
            return file
    except BlockingIOError:
        pass
    os.close(file)
    return None


def _open_lock(path: Path) -> int:
    """Open a lock's file, and make the cache's directory if need be. A link is not followed."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if path.is_symlink():
            raise UserError(f"{path} in the cache is a link, which fedray never makes; remove it.") from None
        raise UserError(
            f"{path.parent} cannot be written ({error.strerror}); set FEDRAY_CACHE to a directory that can."
        ) from None


def say(sentence: str) -> None:
    Console(stderr=True).print(sentence, highlight=False, markup=False)

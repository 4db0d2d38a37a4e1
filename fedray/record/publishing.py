"""Writes a run that is at a URL: what is new in its directory, as objects, and then a manifest that names them."""

import hashlib
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fedray.errors import RunError, UserError
from fedray.files import LOCK, is_content, is_locked
from fedray.record.copies import HEAVY, LARGE, Copy, bring
from fedray.record.manifests import MANIFEST, OBJECT, STOP, File, Listed, Manifest, loose, name_of, now, numbers
from fedray.storage import Store, Unreachable, is_url, located, url_of

PACK = 2**26  # bytes of an object of several files, about
PATIENCE = 300.0  # seconds for which a storage that cannot be reached is tried again, while a run goes on
EVERY = 5.0  # seconds between tries
CHECKPOINT = re.compile(r"checkpoints/round-(\d+)\.safetensors")
MEMORY = re.compile(r"clients/\d+/(\d+)\.safetensors")


@contextmanager
def published(directory: Path) -> Iterator["Writer | None"]:
    """Hold a run that is at a URL, and bring its directory up to date; None for a run that is at a path.

    At the end what is new is written, and the run is nobody's.

    Raises:
        UserError: another process writes the run; or the storage does not allow it, or lacks some of it.
        RunError: what is new could not be written.
    """
    url = url_of(directory)
    if url is None:
        yield None
        return
    writer = Writer(directory, Store(url))
    writer.begin()
    try:
        yield writer
    except BaseException:
        with suppress(RunError, OSError):  # the first error is the cause
            writer.publish(last=True, patience=0.0)
        raise
    writer.publish(last=True)


class Writer:
    """Writes a run's manifests. The directory is held (`Run.locked`), so that no other process of this node does."""

    def __init__(self, directory: Path, store: Store) -> None:
        self.directory = directory
        self.store = store
        self.copy = Copy.of(directory)
        self.manifest = Manifest()
        self._publishing = threading.Lock()
        self._beside: list[str] = []  # files that are not the run's
        self._tried = (self.manifest, b"")  # the last manifest that was to be created

    def begin(self) -> None:
        """Take hold of the run, and bring the directory up to date. Raises `UserError`."""
        listed, self.manifest = now(self.store)
        self._beside, number, writer = loose(listed), self.manifest.number, self.manifest.writer
        if writer is not None and writer["copy"] != self.copy.id:
            raise UserError(
                f"{self.store.url} is being written by {self.manifest.who}; if that process has ended, say --take-over."
            )
        self.copy.save()  # so that its id is known if this process is killed
        try:
            self._create(self.manifest.files, listed)
            here: Listed = {name_of(self.manifest.number): {}, **dict.fromkeys(self._beside, {})}
            bring(self.directory, here, whole=True, mine=True)
        except RunError:
            raise UserError(f"{self.store.url} was taken by another process just now; choose another --out.") from None
        except BaseException:
            if self.manifest.number > number:
                with suppress(UserError, RunError):
                    self._create(self.manifest.files, {}, last=True)
            raise
        self.copy = Copy.of(self.directory)

    def publish(self, last: bool = False, patience: float | None = None) -> None:
        """Write what is new in the directory, and a manifest of all that is there; with `last`, nobody writes the run.

        Raises:
            RunError: another process has taken the run over, or the storage does not allow it.
        """
        deadline = time.monotonic() + (PATIENCE if patience is None else patience)
        with self._publishing:
            while True:
                try:
                    self._publish(last)
                    return
                except UserError as error:
                    if not isinstance(error, Unreachable) or time.monotonic() > deadline:
                        raise RunError(f"{str(error).rstrip('.')}; the run's complete rounds are kept.") from None
                time.sleep(EVERY)

    def _publish(self, last: bool) -> None:
        listed = self.store.list()
        number, (tried, contents) = max(numbers(listed), default=0), self._tried
        if number == tried.number > self.manifest.number and self.store.read(name_of(number)) == contents:
            self.manifest = tried  # of which the storage had not told
        if number != self.manifest.number:
            raise self._taken()
        self._create(self._written(listed), listed, last)
        self.copy.save()

    def _create(self, files: Mapping[str, File], listed: Listed, last: bool = False) -> None:
        """Create the next manifest; then remove what neither it nor the one before it names, of what was listed."""
        who = {"copy": self.copy.id, "host": socket.gethostname(), "process": os.getpid()}
        writer = None if last else who | {"time": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        before, after = self.manifest, Manifest(self.manifest.number + 1, files, writer)
        self._tried = after, after.to_bytes()
        if not self.store.create(name_of(after.number), self._tried[1]):
            raise self._taken()
        self.manifest, self.copy.writer = after, writer
        old = {name_of(number) for number in numbers(listed) if number < before.number}
        old |= {name for name in listed if OBJECT.fullmatch(name)} - before.objects - after.objects
        self.store.remove(sorted(old))

    def _taken(self) -> RunError:
        """Say who has taken the run over."""
        _, found = now(self.store)
        who = f"by {found.who}" if found.writer is not None else "from this process"
        return RunError(f"the run at {self.store.url} was taken over {who}; this process writes no more of it.")

    def _written(self, listed: Listed) -> dict[str, File]:
        """Write the contents of files that are new, and return where those of all files are."""
        paths = self._paths()
        files = {name: file for name, file in self.manifest.files.items() if name in paths}
        used: dict[str, int] = {}  # bytes of each object that are still files
        for file in files.values():
            used[file.object] = used.get(file.object, 0) + file.size
        half_empty = {name for name, bytes in used.items() if 2 * bytes < listed.get(name, {}).get("size", 0)}
        new = [
            name for name, path in paths.items()
            if not self.copy.has(path, name, files.get(name)) or files[name].object in half_empty
        ]  # fmt: skip
        pack, contents = _new(), bytearray()
        for name in new:
            path = paths[name]
            try:
                found = path.stat()
                if found.st_size >= LARGE and name.startswith(HEAVY):  # to others a line may be added meanwhile
                    with open(path, "rb") as opened:
                        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
                    self.store.write(alone := _new(), path)
                    files[name] = File(alone, 0, found.st_size, sha256, found.st_mtime)
                else:
                    data = path.read_bytes()
                    sha256 = hashlib.sha256(data).hexdigest()
                    files[name] = File(pack, len(contents), len(data), sha256, found.st_mtime)
                    contents += data
            except FileNotFoundError:  # a picture, say, that is replaced just now
                files.pop(name, None)
                continue
            self.copy.files[name] = [*files[name][:3], found.st_size, found.st_mtime_ns]
            if len(contents) >= PACK:
                self.store.write(pack, bytes(contents))
                pack, contents = _new(), bytearray()
        if contents or any(file.object == pack for file in files.values()):
            self.store.write(pack, bytes(contents))
        return files

    def _paths(self) -> dict[str, Path]:
        """List the files of the run. Memories of a round that is not complete are not yet."""
        paths = {}
        for folder, below, names in os.walk(self.directory):
            below.sort()
            for path in (Path(folder, name) for name in sorted(names)):
                name = path.relative_to(self.directory).as_posix()
                if is_content(path) and name != STOP and name not in self._beside:
                    paths[name] = path
        rounds = max((int(found[1]) for name in paths if (found := CHECKPOINT.fullmatch(name))), default=0)
        early = {name for name in paths if (found := MEMORY.fullmatch(name)) and int(found[1]) > rounds}
        return {name: path for name, path in paths.items() if name not in early}


def _new() -> str:
    """Return the name of an object that there is not."""
    return f"objects/{uuid.uuid4().hex}"


def take_over(place: str | Path) -> None:
    """Take the runs at and below a URL from the processes that write them: they find out when they write next.

    Raises:
        UserError: a run is written by a process of this machine, or by one that writes just now.
    """
    if not is_url(place):
        raise UserError(f"--take-over is for runs at URLs, as s3://BUCKET/RUN; {place} is a path.")
    directory = located(place)
    url = url_of(directory)
    assert url is not None
    runs = {match[1] for match in map(MANIFEST.fullmatch, Store(url).list()) if match is not None}
    for prefix in sorted(runs):
        if is_locked(directory / prefix / LOCK):
            raise UserError(f"{url}/{prefix} is being written by a process of this machine; stop that one.")
        store = Store(f"{url}/{prefix}".rstrip("/"))
        _, found = now(store)
        free = Manifest(found.number + 1, found.files)
        if found.writer is not None and not store.create(name_of(free.number), free.to_bytes()):
            raise UserError(f"{store.url} is being written by {found.who}; stop that process.")

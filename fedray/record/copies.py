"""Copies on this node of runs that are at URLs, brought up to date before they are read."""

import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedray import cache
from fedray.cache import COPIES, KNOWN
from fedray.errors import UserError
from fedray.files import ASIDE, LOCK, durably, is_content, is_locked, size, write
from fedray.record.manifests import MANIFEST, TRIES, File, Listed, Manifest, latest, loose, name_of, numbers
from fedray.storage import Store, is_url, located, names_below, url_of

LARGE = 2**23  # bytes of a file that has an object of its own
HEAVY = ("checkpoints/", "clients/", "model/")  # what tables and reports do not read
OF_SWEEPS = re.compile(r"(?:.*/)?(?:[^/]+\.sweep\.json|results\.parquet|failed\.txt|stopped\.txt)")
SPARED = 60.0  # seconds for which a new file in a copy is not taken for one that was removed from the storage


@dataclass
class Copy:
    """What is known of the copy of a run on this node, kept beside it: its id, and which contents its files have."""

    place: Path
    id: str
    writer: Mapping[str, Any] | None = None
    files: dict[str, list[Any]] = field(default_factory=dict)  # object, offset, size; bytes and time on this disk

    @classmethod
    def of(cls, directory: Path) -> "Copy":
        place = _beside(directory) / "copy.json"
        try:
            values = json.loads(place.read_text())
            return cls(place, values["id"], values["writer"], values["files"])
        except (OSError, ValueError, KeyError):  # there is none yet, or a power failure cut it
            return cls(place, uuid.uuid4().hex)

    def save(self) -> None:
        self.place.parent.mkdir(parents=True, exist_ok=True)
        write(self.place, json.dumps({"id": self.id, "writer": self.writer, "files": self.files}))

    def note(self, path: Path, name: str, file: File) -> None:
        """Note that a file has these contents."""
        found = path.stat()
        self.files[name] = [*file[:3], found.st_size, found.st_mtime_ns]

    def has(self, path: Path, name: str, file: File | None) -> bool:
        """Tell whether a file has these contents, and was not written since."""
        known = self.files.get(name)
        if known is None or file is None or known[:3] != list(file[:3]) or not path.is_file():
            return False
        found = path.stat()
        return known[3:] == [found.st_size, found.st_mtime_ns]


def _beside(directory: Path) -> Path:
    """Return where what is known of a copy is kept."""
    parts = list(directory.parts)
    index = next(i for i in range(1, len(parts) - 1) if parts[i - 1] == COPIES and parts[i].endswith(":"))
    return Path(*parts[: index - 1], KNOWN, *parts[index:])


def local(place: str | Path, whole: bool = False) -> Path:
    """Return the directory of a place. Of a URL it is a copy on this node, brought up to date with all runs below it.

    Args:
        whole: with checkpoints, memories and models; else without.

    Raises:
        UserError: the storage cannot be read, or lacks an object that a manifest names.
    """
    directory = located(place)
    if not is_url(place):
        return directory
    url = url_of(directory)
    assert url is not None
    began, store = time.time(), Store(url)
    listed = {name: about for name, about in store.list().items() if names_below(name)}
    below: dict[str, dict[str, Any]] = {}  # of each run, what is below it
    for prefix in sorted({match[1] for match in map(MANIFEST.fullmatch, listed) if match is not None}):
        if not prefix.startswith(tuple(below)):  # below a run there are no runs
            of_run = {name: about for name, about in listed.items() if name.startswith(prefix)}
            below[prefix] = {name.removeprefix(prefix): about for name, about in of_run.items()}
    files: set[str] = set()
    for prefix, of_run in below.items():
        files |= {prefix + name for name in bring(directory / prefix, of_run, whole).files}
        files |= {prefix + name for name in loose(of_run)}
    for name in listed:
        if not name.startswith(tuple(below)) and OF_SWEEPS.fullmatch(name):
            _download(store, name, directory / name)
            files.add(name)
    for found, folders, names in os.walk(directory):
        if is_locked(Path(found) / LOCK):
            folders.clear()
            continue
        for path in (Path(found, name) for name in names):
            strange = path.relative_to(directory).as_posix() not in files and is_content(path)
            if strange and path.lstat().st_mtime < began - SPARED:
                path.unlink()
    return directory


def bring(directory: Path, listed: Listed, whole: bool, mine: bool = False) -> Manifest:
    """Bring the copy of a run up to date; one that a process of this node writes is as it should be.

    Args:
        listed: the objects of the run.
        mine: this process writes it.
    """
    url = url_of(directory)
    assert url is not None
    store = Store(url)
    for attempt in range(1, TRIES + 1):
        manifest = None
        try:
            manifest = latest(store, listed)
            with cache.locked(_beside(directory) / "copy", f"fetching {url}"):
                if mine or not is_locked(directory / LOCK):
                    _bring(directory, store, manifest, listed, whole)
            return manifest
        except FileNotFoundError as error:  # it was replaced meanwhile, or is lost
            listed = store.list()
            number = max(numbers(listed), default=0)
            if attempt == TRIES or (manifest is not None and number == manifest.number):
                name = name_of(number)
                raise UserError(
                    f"{url}/{name} names {error.args[0]}, which is not there: the run is damaged."
                ) from None
    raise AssertionError


def _bring(directory: Path, store: Store, manifest: Manifest, listed: Listed, whole: bool) -> None:
    """Fetch what has changed of a run, and remove what it has no more."""
    copy = Copy.of(directory)
    missing: dict[str, dict[str, File]] = {}
    for name, file in manifest.files.items():
        if not copy.has(directory / name, name, file):
            if whole or not name.startswith(HEAVY):
                missing.setdefault(file.object, {})[name] = file
            else:
                (directory / name).unlink(missing_ok=True)
    beside = [name for name in loose(listed) if name not in manifest.files]
    if directory.is_dir():
        for path in directory.rglob("*"):
            name = path.relative_to(directory).as_posix()
            if name not in manifest.files and name not in beside and not path.is_dir() and is_content(path):
                path.unlink()
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        need = sum(file.size for of in missing.values() for file in of.values())
        if need > (free := shutil.disk_usage(directory).free):
            raise UserError(
                f"{store.url}: {size(need)} of it are fetched, and {cache.home()} has {size(free)} free; set "
                f"FEDRAY_CACHE to a directory on another disk."
            )
    for object, files in missing.items():
        try:
            _fetch(directory, store, object, files)
        except FileNotFoundError:
            raise FileNotFoundError(f"{object} ({min(files)})") from None
        for name, file in files.items():
            copy.note(directory / name, name, file)
    for name in beside:
        with suppress(FileNotFoundError):  # it was removed meanwhile
            _download(store, name, directory / name)
    if missing:
        os.sync()  # what `copy.json` says of files is true after a power failure
    copy.files = {name: known for name, known in copy.files.items() if name in manifest.files}
    copy.writer = manifest.writer
    copy.save()


def _fetch(directory: Path, store: Store, object: str, files: Mapping[str, File]) -> None:
    """Fetch files that are in one object, and check them."""
    for parent in {(directory / name).parent for name in files}:
        parent.mkdir(parents=True, exist_ok=True)
    start = min(file.offset for file in files.values())
    end = max(file.offset + file.size for file in files.values())
    alone = len(files) == 1 and end >= LARGE and start == 0
    contents = b"" if alone or start == end else store.read(object, start, end)
    for name, file in files.items():
        path = directory / name
        aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
        try:
            if alone:
                store.download(object, aside)
            else:
                aside.write_bytes(contents[file.offset - start : file.offset - start + file.size])
            if _sha256(aside) != file.sha256:
                raise UserError(f"{store.url}/{object} is damaged: its bytes are not those of {name} in the manifest.")
            os.utime(aside, (file.changed, file.changed))
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)


def _download(store: Store, name: str, path: Path) -> None:
    """Fetch what lies beside runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with durably(path) as aside:
        store.download(name, aside)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def strangers(directory: Path) -> bool:
    """Tell whether the URL of a copy has what is no part of a run."""
    url = url_of(directory)
    return url is not None and bool(loose(Store(url).list()))


def written(directory: Path) -> bool:
    """Tell whether a process writes the run of which this is the copy, as of when it was last brought up to date."""
    if url_of(directory) is None:
        return False
    copy = Copy.of(directory)  # the process of which it was the copy has its lock, or has ended
    return copy.writer is not None and copy.writer["copy"] != copy.id

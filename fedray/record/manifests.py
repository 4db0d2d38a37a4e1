"""A run at a URL: numbered manifests, each created once, and the objects that they name.

manifest-000012.json   the run's files: of each its object, place in it, size and SHA-256; and the process that writes
objects/ID             contents of files that were new: small ones together, large ones alone
stop                   asks the process that writes the run to end it
NAME                   what was put beside the run later, as by `fedray sample`

The manifest with the highest number counts. A process writes the run in a copy on its node, as it would any directory,
and what it has written counts when the next manifest is created. That is also the lock: whoever would write a run
creates the next manifest with its own name in it, which one of several can. So a process from which the run was taken
cannot write a manifest any more.
"""

import json
import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedray.errors import UserError
from fedray.storage import Store, names_below

FORMAT = 1
WRITER = ("host", "process", "time")
TRIES = 5  # of a reader, when what it reads is replaced meanwhile
STOP = "stop"  # a file in a run's directory, or an object: the run is asked to stop
MANIFEST = re.compile(r"((?:.*/)?)manifest-(\d{6,})\.json")
OBJECT = re.compile(r"objects/[0-9a-f]{32}")

Listed = Mapping[str, Mapping[str, Any]]  # objects by name, of `Store.list`


class File(NamedTuple):
    """Where the contents of a file are: bytes of an object."""

    object: str
    offset: int
    size: int
    sha256: str
    changed: float  # seconds since the epoch


@dataclass(frozen=True)
class Manifest:
    """The files of a run, and who writes it.

    writer: the id of its copy of the run, host, process, and when it wrote this; None for nobody.
    """

    number: int = 0
    files: Mapping[str, File] = field(default_factory=dict)
    writer: Mapping[str, Any] | None = None

    @property
    def who(self) -> str:
        """The process that writes the run, in words."""
        assert self.writer is not None
        return "{host} (process {process}, {time})".format(**self.writer)

    @property
    def objects(self) -> set[str]:
        return {file.object for file in self.files.values()}

    def to_bytes(self) -> bytes:
        values = {"format": FORMAT, "number": self.number, "writer": self.writer, "files": self.files}
        return json.dumps(values | {"id": uuid.uuid4().hex}).encode()

    @classmethod
    def read(cls, store: Store, number: int) -> "Manifest":
        """Read a manifest. Raises FileNotFoundError where it was removed, and `UserError` where it is damaged."""
        name = name_of(number)
        try:
            values = json.loads(store.read(name))
            files = {str(path): File(*about) for path, about in values["files"].items()}
            good = all(map(_is_name, files))
            good &= all(OBJECT.fullmatch(file.object) and 0 <= file.changed < 2**40 for file in files.values())
            good &= all(min(file.offset, file.size) >= 0 for file in files.values())
            writer = values["writer"]
            if values["format"] != FORMAT or not good or not (writer is None or {"copy", *WRITER} <= writer.keys()):
                raise ValueError("it names what no run has")
            return cls(number, files, writer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{store.url}/{name} is damaged, or of another version: {error}.") from None


def latest(store: Store, listed: Listed) -> Manifest:
    """Read the manifest that counts; an empty one where there is none."""
    number = max(numbers(listed), default=0)
    return Manifest.read(store, number) if number else Manifest()


def now(store: Store) -> tuple[Listed, Manifest]:
    """List a run's objects, and read the manifest that counts. Raises `UserError`."""
    for _ in range(TRIES):
        listed = store.list()
        with suppress(FileNotFoundError):  # it was replaced meanwhile
            return listed, latest(store, listed)
    raise UserError(f"{store.url} changes faster than it can be read; try again.")


def name_of(number: int) -> str:
    """Return the name of the object that a manifest is."""
    return f"manifest-{number:06d}.json"


def numbers(listed: Iterable[str]) -> list[int]:
    """Return the numbers of a run's manifests."""
    found = (MANIFEST.fullmatch(name) for name in listed)
    return [int(match[2]) for match in found if match is not None and not match[1]]


def loose(listed: Iterable[str]) -> list[str]:
    """Return the files beside a run's manifests and objects."""
    names = (name for name in listed if not MANIFEST.fullmatch(name) and not OBJECT.fullmatch(name))
    return [name for name in names if _is_name(name) and name != STOP]


def _is_name(name: str) -> bool:
    """Tell whether a file of a run may have a name: none that leads out of its directory, and no lock's."""
    return names_below(name) and not any(part.startswith(".") for part in name.split("/"))

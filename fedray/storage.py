"""Storage that URLs name, by fsspec: s3://, gs:// and others. A node works on a copy of it, in its cache.

The copy of s3://bucket/runs/a is …/storage/s3:/bucket/runs/a, so that a path tells its URL, in every process.
"""

import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from fedray import cache
from fedray.cache import COPIES
from fedray.errors import UserError, reason
from fedray.files import size

URL = re.compile(r"([a-z][a-z0-9+.-]+):/+(.+)", re.DOTALL)  # a `Path` of one has only one of its slashes
AT_ONCE = 256  # files that are fetched between two looks of the progress bar
TRIES = 3


def is_url(place: str | Path) -> bool:
    """Tell whether a place is in a storage that a URL names."""
    found = URL.fullmatch(str(place))
    return found is not None and found[1] != "file"


def located(place: str | Path, root: Path | None = None) -> Path:
    """Return the path of a place: of a URL, that of its copy in this node's cache. Nothing is fetched.

    Args:
        root: the directory for copies, if it is another.

    Raises:
        UserError: it is no URL of a storage.
    """
    found = URL.fullmatch(str(place))
    if found is None:
        return Path(place)
    if found[1] == "file":
        return Path("/" + found[2])
    parts = found[2].rstrip("/").split("/")
    if not all(map(_is_plain, parts)):
        raise UserError(f"{place} is no URL of a storage: it must be of the form s3://BUCKET/FOLDER, without dots.")
    return (root or cache.home()).joinpath(COPIES, f"{found[1]}:", *parts)


def url_of(path: Path) -> str | None:
    """Return the URL of which a path is the copy; None where it is none."""
    parts = path.parts
    for index in range(1, len(parts) - 1):
        if parts[index - 1] == COPIES and parts[index].endswith(":"):
            return f"{parts[index]}//{'/'.join(parts[index + 1 :])}"
    return None


def shown(path: Path) -> str:
    """Write a path as users know it: of a copy, its URL."""
    return url_of(path) or str(path)


def names_below(parts: str) -> bool:
    """Tell whether a name of an object stays below where it is: a storage may have been filled by anyone."""
    return all(map(_is_plain, parts.split("/")))


def _is_plain(part: str) -> bool:
    return part not in ("", ".", "..") and "\0" not in part


class Unreachable(UserError):
    """A storage that does not answer as it should: it may later."""


class Store:
    """The objects below a URL. Names are relative to it.

    Methods raise FileNotFoundError for an object that is not there, and `UserError` for all else that goes wrong; what
    passes (an answer of 5xx, a connection that is reset) has been tried again, by the package of that storage.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # its packages take long to import

        self.url = url
        scheme = url.split(":")[0]
        try:
            self.fs = fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as error:
            hint = " (it comes with fedray[s3])" if scheme == "s3" else ""
            raise UserError(f"{url} needs a Python package that is not installed{hint}: {reason(error)}.") from None
        except ValueError:
            raise UserError(f"{url}: there is no storage {scheme}:// that fsspec knows; s3:// and gs:// are.") from None
        except Exception as error:  # each package has its own
            raise self._refusal(error) from None
        self.root = self.fs._strip_protocol(url).rstrip("/")

    def list(self) -> dict[str, dict[str, Any]]:
        """List the objects by name, with what the storage says of them: `size`, and more that its package names."""
        try:
            found = self.fs.find(self.root, detail=True)
        except Exception as error:
            raise self._refusal(error) from None
        below = {path.removeprefix(self.root).lstrip("/"): about for path, about in found.items()}
        return {name: about for name, about in below.items() if about.get("type", "file") == "file"}

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the contents of an object, or the bytes from `start` to `end`."""
        with self._read():
            return self.fs.cat_file(self._path(name), start=start, end=end)

    def download(self, name: str, path: Path) -> None:
        """Write the contents of an object to a file."""
        with self._read():
            self.fs.get_file(self._path(name), str(path))

    def write(self, name: str, contents: bytes | Path) -> None:
        """Write an object, of bytes or of a file's contents, in place of the one of that name."""
        try:
            if isinstance(contents, Path):
                self.fs.put_file(str(contents), self._path(name))
            else:
                self.fs.pipe_file(self._path(name), contents)
        except Exception as error:
            raise self._refusal(error) from None

    def create(self, name: str, contents: bytes) -> bool:
        """Write an object that nobody else has written: of several that try, one succeeds. Tell whether we did.

        The contents must be nobody else's. That only one succeeds is certain where the storage has conditional writes
        (S3, Google's, Azure's): elsewhere, of two that try within milliseconds of each other, both may.
        """
        path = self._path(name)
        for attempt in range(1, TRIES + 1):
            try:
                self.fs.pipe_file(path, contents, mode="create")
            except FileExistsError:
                pass  # an earlier request of ours may have come through, whose answer was lost
            except TypeError:  # a storage whose package knows no conditional writes
                if not self.exists(name):
                    self.write(name, contents)
            except Exception as error:
                if attempt == TRIES and not self.exists(name):
                    raise self._refusal(error) from None
            with suppress(FileNotFoundError):
                return self.read(name) == contents
        return False

    def exists(self, name: str) -> bool:
        """Tell whether there is an object of that name."""
        try:
            return bool(self.fs.exists(self._path(name)))
        except Exception as error:
            raise self._refusal(error) from None

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, of those that are there."""
        for name in names:
            with suppress(FileNotFoundError), self._read():
                self.fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def _read(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> UserError:
        """Say in a sentence what a storage's package raised: each has its own errors."""
        if isinstance(error, FileNotFoundError):
            bucket = self.url.split("//")[1].split("/")[0]
            return UserError(f"{self.url}: there is no bucket {bucket} ({reason(error)}); make it first.")
        if "CredentialsError" in type(error).__name__:
            return UserError(
                f"{self.url}: no credentials were found ({reason(error)}); set them in the environment, as "
                f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role."
            )
        if isinstance(error, PermissionError):
            return UserError(f"{self.url}: the credentials of this machine do not allow that ({reason(error)}).")
        return Unreachable(f"{self.url} cannot be reached: {reason(error)}.")


def folder(place: str, flag: str) -> Path:
    """Return the folder that a flag names: of a URL, a copy in this node's cache, fetched unless it is there.

    Objects that are added, removed or changed make another copy.

    Raises:
        UserError: it cannot be fetched.
    """
    if not is_url(place):
        return Path(place)
    url = url_of(located(place))
    assert url is not None
    store = Store(url)
    listed = store.list()
    if "" in listed:
        raise UserError(f"{flag}{place} is one object, not a folder of them.")
    if not listed:
        raise UserError(f"{flag}{place} does not exist: there is no object below it.")
    bad = next((name for name in listed if not names_below(name)), None)
    if bad is not None:
        raise UserError(f"{flag}{place} has an object {bad!r}, which is no name for a file; rename it.")
    stamp = [[name, about["size"], _changed(about)] for name, about in sorted(listed.items())]
    what, key = f"fetching {url}", ["fetched", 1, url, stamp]
    entry = cache.place_of(key)
    if not cache.is_whole(entry):
        entry = cache.kept(what, key, lambda aside: _fetch(store, listed, located(url, aside)))
    return located(url, entry)


def _changed(about: dict[str, Any]) -> str:
    """Return what changes whenever an object does, of what a storage says of it."""
    known = ("ETag", "etag", "md5Hash", "content_settings", "LastModified", "updated", "mtime", "created")
    return str(next((about[name] for name in known if about.get(name)), ""))


def _fetch(store: Store, listed: dict[str, dict[str, Any]], into: Path) -> None:
    """Fetch all objects, as files below a directory."""
    into.mkdir(parents=True)
    need, free = sum(about["size"] for about in listed.values()), shutil.disk_usage(into).free
    if need > free:
        raise UserError(
            f"{store.url} has {size(need)}, and {cache.home()} {size(free)} free; set FEDRAY_CACHE to a directory on "
            f"another disk."
        )
    names = sorted(listed)
    starts = range(0, len(names), AT_ONCE)
    for start in track(starts, f"fetching {store.url}", console=Console(stderr=True), transient=True):
        some = names[start : start + AT_ONCE]
        for parent in {(into / name).parent for name in some}:
            parent.mkdir(parents=True, exist_ok=True)
        try:
            store.fs.get([store._path(name) for name in some], [str(into / name) for name in some])
        except Exception as error:  # each package has its own
            raise UserError(f"{store.url} cannot be fetched: {reason(error)}.") from None
        cut = next((name for name in some if (into / name).stat().st_size != listed[name]["size"]), None)
        if cut is not None:
            raise UserError(f"{store.url}/{cut} changed while it was fetched; try again.")


def upload(*paths: Path) -> None:
    """Write files that lie in the copy of a storage also there, each as an object of its own; others stay here."""
    for path in paths:
        if (url := url_of(path.parent)) is not None:
            Store(url).write(path.name, path)


def discard(path: Path) -> None:
    """Remove a file, and its object where it lies in the copy of a storage."""
    path.unlink(missing_ok=True)
    if (url := url_of(path.parent)) is not None:
        Store(url).remove([path.name])

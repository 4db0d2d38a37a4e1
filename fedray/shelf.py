"""Entries of the cache that grow: arrays by name, each complete or absent, which all processes of a node map."""

import fcntl
import hashlib
import io
import json
import os
import threading
from pathlib import Path

import numpy as np

from fedray import cache
from fedray.errors import UserError, reason

SUM = hashlib.sha256().digest_size  # bytes of a file's sum, which are its last
MAPPED = 256  # arrays that a process has mapped at a time: each holds a file open, and many systems allow 1,024


class Shelf:
    """An entry of the cache to which any process adds arrays; one that is damaged is as if it were not there.

    Two processes that add the same array add the same bytes, so neither waits. While a shelf is open, `fedray cache`
    does not remove it.
    """

    def __init__(self, what: str, key: object) -> None:
        """Open the shelf of that key, or begin it.

        Args:
            what: describes what is on it, for messages.
            key: JSON that changes whenever an array of the same name would.

        Raises:
            UserError: another user made it, or the cache cannot be written.
        """
        self.what, self.place = what, cache.place_of(key)
        self._mapped: dict[str, np.ndarray] = {}
        self._whole: set[str] = set()
        with cache.locked(self.place, what, shared=True) as lock:
            self._lock = open(lock, "rb")  # noqa: SIM115 (as long as the shelf)
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            try:
                self.place.mkdir(mode=0o700, exist_ok=True)
                cache.check_owner(self.place)
                self._write(self.place / cache.SEAL, json.dumps({"what": what}).encode())
            except OSError as error:
                raise self._not_written(error) from None

    def __contains__(self, name: str) -> bool:
        """Tell whether an array is there, undamaged: a process reads each file once."""
        if name in self._whole:
            return True
        path = self._path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return False
        except OSError as error:
            data, said = b"", f" ({reason(error)})"
        else:
            said = ""
        if hashlib.sha256(data[:-SUM]).digest() != data[-SUM:]:
            cache.say(f"{self.what}: {path} in the cache is damaged{said}; it is made again")
            return False
        self._whole.add(name)
        return True

    def __getitem__(self, name: str) -> np.ndarray:
        """Map an array. Raises KeyError if it is not there, or damaged."""
        found = self._mapped.get(name)
        if found is None:
            if name not in self:
                raise KeyError(name)
            if len(self._mapped) >= MAPPED:
                self._mapped.clear()
            try:
                found = self._mapped[name] = np.load(self._path(name), mmap_mode="r")
            except FileNotFoundError:  # removed by hand meanwhile
                self._whole.discard(name)
                raise KeyError(name) from None
        return found

    def __setitem__(self, name: str, array: np.ndarray) -> None:
        """Add an array. Raises `UserError` where it cannot be written."""
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getvalue()
        try:
            self._write(self._path(name), data + hashlib.sha256(data).digest())
        except OSError as error:
            raise self._not_written(error) from None
        self._whole.add(name)

    def _path(self, name: str) -> Path:
        return self.place / f"{name}.npy"

    def _write(self, path: Path, data: bytes) -> None:
        """Replace a file at once. It need not be durable: of one that is not, the sum tells."""
        aside = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
        try:
            aside.write_bytes(data)
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self.what}: {self.place.parent} cannot be written ({error.strerror or error}); set FEDRAY_CACHE to a "
            f"directory that can."
        )

"""Reading files that anybody may have made, and atomic writes."""

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedray.errors import UserError

ASIDE = ".part"  # how temporary files' names end
LOCK = ".lock"  # how names of files end that are there to be locked


def regular(path: Path) -> Path:
    """Return the path of a file, or of a link to one. Raises `UserError` for anything else: a pipe would be waited for.

    What is not there is left to whoever opens it.
    """
    if path.exists() and not path.is_file():
        mode = path.stat().st_mode
        kind = "a directory" if stat.S_ISDIR(mode) else "a named pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise UserError(f"{path} is {kind}, where a file should be.")
    return path


def read_text(path: Path) -> str:
    """Read a text file. Raises `UserError` if it is no file, or not UTF-8; OSError if it cannot be read."""
    try:
        return regular(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start}).") from None


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """Read a JSON file that holds an object. Raises `UserError`, with a hint what to do, if it is damaged."""
    try:
        values = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged at line {error.lineno}: {error.msg}{hint}.") from None
    except RecursionError:
        raise UserError(f"{path} is damaged: its lists lie in each other too deep{hint}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object{hint}.")
    return values


def as_json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2, default=str) + "\n"  # str: what a user's own task is configured with


def write(path: Path, text: str) -> None:
    """Write a text file: complete or not at all, and on the disk when this returns."""
    with durably(path) as aside:
        aside.write_text(text)


@contextmanager
def durably(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to; then flush it, rename it to `path`, and flush its directory.

    A link at `path` is replaced, and what it leads to stays.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}{ASIDE}")
    aside.unlink(missing_ok=True)
    try:
        yield aside
        flush(aside)
        aside.replace(path)
        flush(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a directory and all in it, or a file or link, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_content(path: Path) -> bool:
    """Tell whether a file is more than what a killed process left of one, or a lock."""
    return not (is_leftover(path) or (path.name.startswith(".") and path.name.endswith(LOCK)))


def is_leftover(path: Path) -> bool:
    """Tell whether a file is what a killed process left of one: ours, or with six letters of safetensors."""
    name = path.name
    return name.startswith(".") and (name.endswith(ASIDE) or re.fullmatch(r"\.tmp\w{6}", name) is not None)


def is_locked(path: Path) -> bool:
    """Tell whether a process of this machine holds the lock of that file."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary files below a directory that killed processes left."""
    for path in directory.rglob(".*"):
        if is_leftover(path):
            path.unlink(missing_ok=True)


def size(bytes: float) -> str:
    """Write a number of bytes in words."""
    scale, unit = next((each for each in ((1e9, "GB"), (1e6, "MB")) if bytes >= each[0]), (1e3, "kB"))
    return f"{bytes / scale:.1f} {unit}"

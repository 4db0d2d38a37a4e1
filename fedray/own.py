"""A user's own Python files: experiments, tasks, metrics."""

import importlib.util
import inspect
import sys
import traceback
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from fedray.errors import UserError, reason

SOURCE = "_fedray_source"  # where `source_of` keeps what it has found

_modules: dict[tuple[Path, int, int], ModuleType] = {}  # by place, time of change and size


def load_file(path: str | Path) -> ModuleType:
    """Run a user's Python file as a module, once until it changes.

    The module is in `sys.modules` under a name of its own, since dataclasses look up their annotations there. The
    file's folder joins `sys.path` and stays there: functions of the file may import its neighbours later.

    Raises:
        UserError: there is no such file, or it does not run; the message says in which line.
    """
    path = Path(path)
    place = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no file {path}.")
    version = (place, place.stat().st_mtime_ns, place.stat().st_size)
    if version in _modules:
        return _modules[version]
    # Of two files of the same name, each keeps its own module.
    name = f"fedray_own_{path.stem}_{sha256(repr(version).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, place)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    if str(place.parent) not in sys.path:
        sys.path.insert(0, str(place.parent))
    sys.modules[name] = _modules[version] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del _modules[version]
        sys.modules.pop(name, None)
        if isinstance(error, Exception):
            raise UserError(f"{path}{_line(error, place)}: {_sentence(error)}") from error
        raise
    return module


def loaded() -> list[ModuleType]:
    """Return the modules of all files loaded so far."""
    return list(_modules.values())


def source_of(cls: type) -> str | None:
    """Return a class as FILE.py:CLASS; None where it is in no file.

    It is kept on the class: one that Ray has copied into another process has no file there.
    """
    kept = vars(cls).get(SOURCE)
    if kept is None and "." not in cls.__qualname__:
        try:
            file = inspect.getsourcefile(cls)
        except (TypeError, OSError):
            file = None
        if file is not None and file.endswith(".py"):
            kept = f"{Path(file).absolute()}:{cls.__qualname__}"
            setattr(cls, SOURCE, kept)
    return kept


def _line(error: Exception, place: Path) -> str:
    """Find the line of the file that fails: the innermost, if functions of the file call each other."""
    if isinstance(error, SyntaxError) and error.filename == str(place):
        line = error.lineno
    else:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(place)), None)
    return "" if line is None else f", line {line}"


def _sentence(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = error.msg if isinstance(error, SyntaxError) else reason(error)
    return f"{type(error).__name__}: {text}."

"""A user's own Python files."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fedray.errors import UserError, reason

_MODULES: dict[Path, ModuleType] = {}


def load_file(path: str | Path) -> ModuleType:
    """Run a user's Python file, once. Raises `UserError`."""
    place = Path(path).resolve()
    if place not in _MODULES:
        name = f"fedray_own_{len(_MODULES)}_{place.stem}"
        spec = importlib.util.spec_from_file_location(name, place)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise UserError(f"{path} does not run: {reason(error)}.") from error
        _MODULES[place] = module
    return _MODULES[place]


def loaded() -> list[ModuleType]:
    """Return the modules that were loaded."""
    return list(_MODULES.values())

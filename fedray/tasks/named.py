"""Tasks in JSON: fedray's own by name, a user's by the file and the name of its class."""

import dataclasses
import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedray import own
from fedray.errors import UserError, check_name
from fedray.tasks import Task

OURS = {"ddpm": ("fedray.tasks.ddpm", "DDPM"), "lora": ("fedray.tasks.lora", "LoRA")}  # imported when asked for


def task_class(name: str) -> type:
    """Return the class of a task by its name, or by FILE.py:CLASS. Raises `UserError`."""
    if ".py:" not in name:
        check_name("task", name, OURS)
        module, cls = OURS[name]
        return getattr(importlib.import_module(module), cls)
    file, _, cls = name.rpartition(":")
    found = getattr(own.load_file(file), cls, None)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(f"{file} has no dataclass {cls!r} (the form of a task of your own is FILE.py:CLASS).")
    return found


def task_to_json(task: Task) -> dict[str, Any]:
    """Return a task's name and settings; of a user's own also its class, as FILE.py:CLASS, where it is in a file."""
    cls = type(task)
    values = {"name": task.name, **dataclasses.asdict(task)}
    if cls.__module__.startswith("fedray.tasks."):
        return values
    source = own.source_of(cls)
    return values if source is None else values | {"class": source}


def task_from_json(values: Mapping[str, Any], allowed: Collection[Path]) -> Task:
    """Return the inverse of `task_to_json`.

    Args:
        allowed: the user's own files that may run.

    Raises:
        UserError: the task's class is not there, takes other settings, or is in a file that may not run.
    """
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    name, cls = str(settings.pop("name")), settings.pop("class", None)
    if cls is None and name not in OURS:
        raise UserError(
            f"the task {name!r} of this run is not fedray's own, and its class is in no file; continue it from the "
            f"Python script that defines it, with fedray.run(config, out, resume=True)."
        )
    if cls is not None:
        file = Path(str(cls).rpartition(":")[0])
        if file.resolve() not in allowed:
            raise UserError(
                f"the task {name!r} of this run is code in {file}: if you trust it, name the file again "
                f"(--code {file})."
            )
    try:
        return task_class(str(cls or name))(**settings)
    except TypeError as error:
        raise UserError(f"this run is of another version: its task {name!r} does not fit ({error}).") from None

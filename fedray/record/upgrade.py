"""Upgrades of config.json from older versions: the only place that knows former names of settings."""

from collections.abc import Mapping
from typing import Any

from fedray.config import FORMAT
from fedray.errors import UserError

RENAMED = {"rule": "algorithm", "codec": "wire"}


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return an older version's configuration in today's names, without settings that are new."""
    if "algorithm" in config:
        return dict(config)
    task = {name: value for name, value in config.get("task", {}).items() if name != "train_a"}
    return {RENAMED.get(name, name): value for name, value in config.items()} | {"task": task}


def check_format(saved: Mapping[str, Any], directory: object) -> None:
    """Raise `UserError` for a run of another format, which can be read but not continued."""
    found = saved.get("format", 1)
    if found != FORMAT:
        raise UserError(
            f"the run at {directory} was begun by another version of fedray (format {found}, now {FORMAT}): it can be "
            f"sampled, evaluated and reported on, but not continued; begin another run."
        )

"""A command's flags beside those of every setting, which start from a preset."""

from collections.abc import Mapping, Sequence
from dataclasses import field, make_dataclass, replace
from typing import Annotated, Any

import tyro

from fedray.config import Config


def ask(
    command: type,
    base: Config,
    arguments: list[str],
    name: str,
    what: str,
    presets: Mapping[str, tuple[Any, Sequence[str]]],
) -> tuple[Any, Config]:
    """Parse a command's arguments: its own, and the configuration that they make of `base`.

    Args:
        command: dataclass of the command's own flags; a base of what is returned first.
        presets: flags that choose one of several names: the one chosen, and all.
    """
    # Given on the command line, local steps replace the base's local epochs, and the other way round.
    blank = replace(base, local_epochs=None, local_steps=None)
    task: Any = type(base.task)
    fields: list[Any] = [
        (flag, Annotated[str | None, tyro.conf.arg(help=f"Settings to start from: {', '.join(names)}.")], chosen)
        for flag, (chosen, names) in presets.items()
    ]
    fields += [
        ("task", tyro.conf.OmitArgPrefixes[task], field(default=base.task)),  # type: ignore[misc]
        ("config", tyro.conf.OmitArgPrefixes[Config], field(default=blank)),
    ]
    asked: Any = tyro.cli(
        make_dataclass("Asked", fields, bases=(command,), frozen=True),
        args=arguments,
        prog=f"fedray {name}",
        description=what,
    )
    config = replace(asked.config, task=asked.task)
    if config.local_epochs is None and config.local_steps is None:
        config = replace(config, local_epochs=base.local_epochs, local_steps=base.local_steps)
    return asked, config

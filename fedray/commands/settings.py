"""A command's own flags, beside a flag for every setting; a preset gives the defaults."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import tyro

from fedray.commands import aliases
from fedray.commands.flags import Flag, flags_of
from fedray.commands.help import short_help
from fedray.config import Config
from fedray.presets import PRESETS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Settings(Generic[T]):
    """Flags of a command (the fields of a subclass), of the task and of the configuration, side by side."""

    preset: str | None
    task: tyro.conf.OmitArgPrefixes[T]
    config: tyro.conf.OmitArgPrefixes[Config]


S = TypeVar("S", bound=Settings)


def command_of(config: Config) -> str:
    """Return the command that trains what the configuration learns."""
    return "finetune" if "adapters" in config.task_offers else "train"


def presets_of(*commands: str) -> list[str]:
    """List the presets for these commands; for none, all."""
    return [name for name, config in PRESETS.items() if not commands or command_of(config) in commands]


def preset_help(*commands: str) -> Any:
    """Make the help of `--preset`: the presets for these commands."""
    return tyro.conf.arg(help=f"Settings to start from: {', '.join(presets_of(*commands))}.")


def ask(
    command: type[S], base: Config, arguments: list[str], name: str, what: str, preset: str | None
) -> tuple[S, Config]:
    """Parse a command's arguments: its own flags, and the configuration that the others make of `base`.

    Names of diffusers' scripts are translated. Without --help-all, --help shows what most people use.
    """
    flags = flags_of(command, type(base.task))
    if "-h" in arguments or "--help" in arguments:
        print(short_help(name, what, flags, base, preset), end="")
        raise SystemExit(0)
    arguments = ["--help" if argument == "--help-all" else argument for argument in arguments]
    arguments, meant = aliases.translated(arguments, names_of(flags))
    # Given on the command line, local steps replace the base's local epochs, and the other way round.
    blank = replace(base, local_epochs=None, local_steps=None)
    with warnings.catch_warnings():  # of code that a run names and that may not run: it is not of its field's type
        warnings.simplefilter("ignore", UserWarning)
        parsed = tyro.cli(
            command[type(base.task)],  # type: ignore[index]
            default=command(preset=preset, task=base.task, config=blank),
            args=arguments,
            prog=f"fedray {name}",
            description=what,
        )
    config = replace(parsed.config, task=parsed.task)
    if config.local_epochs is None and config.local_steps is None:
        config = replace(config, local_epochs=base.local_epochs, local_steps=base.local_steps)
    given = {aliases.name_of(argument) for argument in arguments}
    return parsed, aliases.applied(config, meant, given)


def names_of(flags: Sequence[Flag]) -> set[str]:
    """Return all names of flags."""
    return {name for flag in flags for name in (flag.name, *flag.aliases)}

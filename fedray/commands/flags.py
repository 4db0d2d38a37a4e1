"""A command's flags as data: for the short help, shell completion and files of settings."""

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tyro

from fedray.config import Config

NESTED = ("task", "config")  # fields of `Settings` whose own fields are flags


@dataclass(frozen=True)
class Flag:
    """A flag: its field, the values that it takes, and what its documentation says."""

    name: str
    """As it is typed, --learning-rate; without the hyphens for what is given by its place."""
    field: str
    hint: Any
    """The type of its values; of A | None, A."""
    metavar: str
    help: str
    aliases: tuple[str, ...] = ()
    optional: bool = False
    """None is a value."""
    several: bool = False
    """It takes several values."""

    @property
    def switch(self) -> bool:
        """True where it has no value: --x, or --no-x."""
        return self.hint is bool and not self.optional

    @property
    def path(self) -> bool:
        """True where its values are places in the file system."""
        return "Path" in str(self.hint) or self.field.endswith(("_dir", "_path")) or self.field in PLACES


PLACES = ("init_from", "inception_weights")


def flags_of(command: type, task: type | None = None) -> list[Flag]:
    """Return the flags of a command's class; with a task, also its flags and those of the configuration."""
    return [flag for cls in (command, *((task, Config) if task else ())) for flag in _of(cls)]


@cache
def _of(cls: type) -> tuple[Flag, ...]:
    return tuple(_read(cls))


def _read(cls: type) -> Iterator[Flag]:
    hints, told = typing.get_type_hints(cls, include_extras=True), documentation(cls)
    for field in dataclasses.fields(cls):
        hint, marks = hints[field.name], tuple[Any, ...]()
        if typing.get_origin(hint) is typing.Annotated:
            hint, *rest = typing.get_args(hint)
            marks = tuple(rest)
        if tyro.conf.Suppress in marks or field.name in NESTED:
            continue
        plain, optional = _without_none(hint)

        def marked(name: str, marks: tuple[Any, ...] = marks) -> Any:
            return next((value for mark in marks if (value := getattr(mark, name, None))), None)

        name = str(marked("name") or field.name).replace("_", "-")
        metavar = marked("metavar") or _word(plain)
        yield Flag(
            name=name if tyro.conf.Positional in marks else f"--{name}",
            field=field.name,
            hint=plain,
            metavar=str(metavar),
            help=marked("help") or told.get(field.name, ""),
            aliases=tuple(marked("aliases") or ()),
            optional=optional,
            several="tuple" in str(plain) and marked("nargs") != 1,
        )


def _without_none(hint: Any) -> tuple[Any, bool]:
    """Return the type without None, and whether None was one of its values."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    plain = kinds[0] if len(kinds) == 1 else typing.Union[tuple(kinds)]  # noqa: UP007
    return plain, len(kinds) < len(typing.get_args(hint))


def _word(hint: Any) -> str:
    if "tuple" in str(hint):
        inner = next(each for each in typing.get_args(hint) if each is not Ellipsis)
        return _word(inner) + " …" if typing.get_origin(hint) is tuple else _word(inner).removesuffix(" …") + " …"
    return {int: "INT", float: "FLOAT", bool: "BOOL", Path: "PATH"}.get(hint, "TEXT")


@cache
def documentation(cls: type) -> dict[str, str]:
    """Return the strings below a dataclass's fields, in one line each, by field."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):  # a class of the user's own, in no file
            continue
        assert isinstance(body, ast.ClassDef)
        for field, after in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                if isinstance(text, ast.Constant) and isinstance(text.value, str):
                    found[field.target.id] = " ".join(text.value.split())
    return found

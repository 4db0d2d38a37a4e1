"""Short forms: objects that a user names in one word on the command line, in JSON or in Python.

dirichlet:0.1              a class of fedray's, and the values of its fields in order
fedadam:0.01:tau=0.1       or by name
ema:0.999:fedadam:0.01     a wrapper takes the rest for what it wraps
mine.py:FedProx:0.1        a class of the user's own, in a file
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedray import own
from fedray.errors import UserError, check_name, reason

TORCHSCRIPT = (".pt", ".pth", ".ts")
CODE = (".py", *TORCHSCRIPT)  # files that run when they are loaded


@dataclass(frozen=True)
class Menu:
    """The classes of one kind that can be named: those that a module, or the files of a package, define.

    kind: a word for messages;  base: the class that they, and users' own, derive from;  module: where ours are.
    """

    kind: str
    base: type
    module: str

    @cached_property
    def classes(self) -> dict[str, type]:
        """The classes by name: their own `name`, else the class's in lower case."""
        module = importlib.import_module(self.module)
        modules = [module]
        for entry in pkgutil.iter_modules(getattr(module, "__path__", [])):
            modules.append(importlib.import_module(f"{self.module}.{entry.name}"))
        return {
            name_of(cls): cls
            for each in modules
            for cls in vars(each).values()
            if isinstance(cls, type) and issubclass(cls, self.base) and cls.__module__ == each.__name__
            if cls is not self.base and not cls.__name__.startswith("_") and not vars(cls).get("abstract", False)
        }

    def parse(self, text: str, allowed: Collection[Path] | None = None) -> Any:
        """Make the object that a short form names.

        Args:
            allowed: the user's own files that may run; None for all. What is in another becomes an `Unloaded`.

        Raises:
            UserError: there is no such class, or it takes other values.
        """
        name, *values = text.split(":")
        if not name.endswith(".py"):
            check_name(self.kind, name, self.classes)
            return self._make(self.classes[name], text, values, allowed)
        file = Path(name).absolute()
        if allowed is not None and file.resolve() not in allowed:
            return Unloaded(self.kind, ":".join([str(file), *values]))
        own_name, *values = values or [""]
        cls = getattr(own.load_file(file), own_name, None)
        if not (isinstance(cls, type) and issubclass(cls, self.base)):
            raise UserError(
                f"{self.kind} {text!r}: {name} has no class {own_name!r} that derives from fedray's "
                f"{self.base.__name__} (the form is FILE.py:CLASS:VALUES)."
            )
        return self._make(cls, text, values, allowed)

    def form(self, chosen: Any) -> str:
        """Return the short form that `parse` reads; the repr of an object whose class is in no file."""
        if isinstance(chosen, Unloaded):
            return chosen.text
        cls = type(chosen)
        if self.classes.get(name_of(cls)) is cls:
            name = name_of(cls)
        else:
            source = own.source_of(cls)
            if source is None:
                return repr(chosen)
            name = source
        words, nested, in_order = [name], [], True
        for field in fields_of(cls):
            value = getattr(chosen, field.name)
            if self._nests(field):
                nested, in_order = [self.form(value)], False
            elif value == field.default:
                in_order = False
            else:
                text = _text(value)
                words.append(text if in_order else f"{field.name}={text}")
        return ":".join([*words, *nested])

    def _next(self, waiting: list["Field"], value: str) -> "Field | None":
        """The field that a value in order is for: what a wrapper wraps may come before values that have defaults."""
        names_a_class = value in self.classes or value.endswith(".py")
        nested = next((field for field in waiting if self._nests(field)), None)
        return nested if names_a_class and nested is not None else next(iter(waiting), None)

    def _nests(self, field: "Field") -> bool:
        return isinstance(field.type, type) and issubclass(field.type, self.base)

    def _make(self, cls: type, text: str, values: list[str], allowed: Collection[Path] | None) -> Any:
        """Call a class with the values that a short form gives."""
        fields = fields_of(cls)
        by_name = {field.name: field for field in fields}
        waiting, given = list(fields), {}
        form = name_of(cls) + "".join(f":{f.name}" if f.required else f"[:{f.name}]" for f in fields)
        while values:
            value = values.pop(0)
            key, equals, named = value.partition("=")
            field = by_name.get(key) if equals else None
            if field is None:
                field = self._next([field for field in waiting if field.name not in given], value)
            else:
                value = named
            if field is None:
                raise UserError(f"{self.kind} {text!r} is not of the form {form!r}.")
            if self._nests(field):
                given[field.name] = self.parse(":".join([value, *values]), allowed)
                break
            given[field.name] = _value(value, field.type, f"{self.kind} {text!r}", form)
        if any(field.required and field.name not in given for field in fields):
            raise UserError(f"{self.kind} {text!r} is not of the form {form!r}.")
        try:
            return cls(**given)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.kind} {text!r}: {reason(error)}.") from None


@dataclass(frozen=True)
class Unloaded:
    """An object of a file that only a run directory names, not the user: such code never runs by itself.

    Two are equal if their texts are; any use raises `UserError`.
    """

    kind: str
    text: str

    # Enough to sample and to score a model: none of it is asked of an algorithm, a fold or a link.
    needs: typing.ClassVar[Mapping[str, str]] = {}
    offers: typing.ClassVar[frozenset[str]] = frozenset({"fixed coordinates", "same upload", "uploads"})
    trains: typing.ClassVar[None] = None
    uncounted: typing.ClassVar[frozenset[str]] = frozenset()
    uniform: typing.ClassVar[bool] = False
    coded: typing.ClassVar[bool] = False
    sparse: typing.ClassVar[bool] = False
    remembers: typing.ClassVar[bool] = False
    diverges: typing.ClassVar[bool] = False
    differences: typing.ClassVar[bool] = False
    contracts: typing.ClassVar[bool] = False
    private: typing.ClassVar[bool] = False
    bound: typing.ClassVar[None] = None
    example_noise: typing.ClassVar[None] = None
    hides_examples: typing.ClassVar[bool] = False
    hides: typing.ClassVar[frozenset[str]] = frozenset()
    least: typing.ClassVar[int] = 1
    most: typing.ClassVar[float] = float("inf")

    def needed(self, clients: int) -> int:
        """Return the clients that a fold needs of so many."""
        return self.least

    def refuse(self) -> typing.NoReturn:
        """Raise `UserError` with what to type where the code may run."""
        place, _, _ = self.text.partition(":")
        again = f"the file again (--code {place})" if place.endswith(CODE) else f"it again (--{self.kind} {self.text})"
        raise UserError(
            f"this needs the {self.kind} {self.text}, which is code that the run names: if you trust it, name {again}."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse()

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Field:
    """A parameter of a class: its name, its type and its default (`inspect.Parameter.empty` for none)."""

    name: str
    type: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def fields_of(cls: type) -> list[Field]:
    """Return the parameters that a class is made with."""
    hints = typing.get_type_hints(vars(cls).get("__init__", object.__init__))
    parameters = inspect.signature(cls).parameters.values()
    return [Field(each.name, _plain(hints.get(each.name, str)), each.default) for each in parameters]


def name_of(cls: type) -> str:
    """Return the name of a class in short forms."""
    return vars(cls).get("name", cls.__name__.lower())


def _plain(hint: Any) -> Any:
    """Return X for the type `X | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(each for each in typing.get_args(hint) if each is not type(None))
    return hint


def _value(text: str, kind: Any, what: str, form: str) -> Any:
    """Convert a value to its field's type."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{what}: {text!r} is neither true nor false (the form is {form!r}).")
        return text.lower() == "true"
    if kind not in (int, float):
        return text
    try:
        return kind(text)
    except ValueError:
        number = "a whole number" if kind is int else "a number"
        raise UserError(f"{what}: {text!r} is not {number} (the form is {form!r}).") from None


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def files_named(arguments: Collection[str]) -> set[Path]:
    """Return the files of code that command-line arguments name, as `FILE.py:Class` or alone: these may run."""
    whole = [part for argument in arguments for part in (argument, argument.partition("=")[2])]
    words = [*whole, *(word for part in whole for word in re.split(r"[=,]", part))]
    parts = [part for word in words for part in (word, *word.split(":"))]
    return {Path(part).resolve() for part in parts if part.endswith(CODE) and Path(part).is_file()}


def parse_all(menu: Menu, text: str, plain: Mapping[str, tuple], allowed: Collection[Path] | None = None) -> tuple:
    """Make the objects of a list of short forms, separated by commas; `plain` are names for whole lists."""
    if text in plain:
        return plain[text]
    return tuple(menu.parse(each, allowed) for each in text.split(","))


def find_sources(part: Any) -> None:
    """Find the files of the classes of an object and of those that it wraps, while they are in this process."""
    if dataclasses.is_dataclass(part) and not isinstance(part, Unloaded):
        if not type(part).__module__.startswith("fedray."):
            own.source_of(type(part))
        for value in vars(part).values():
            find_sources(value)


def check_loaded(part: Any) -> None:
    """Raise `UserError` if an object, or one that it wraps, is code that has not been allowed to run."""
    if isinstance(part, Unloaded):
        part.refuse()
    for value in vars(part).values() if dataclasses.is_dataclass(part) else part if isinstance(part, tuple) else ():
        check_loaded(value)


def check_types(settings: Any) -> None:
    """Raise `UserError` where a field of a dataclass that is a number or text holds something else."""
    hints = typing.get_type_hints(type(settings))
    for each in dataclasses.fields(settings):
        kinds = typing.get_args(hints[each.name]) or (hints[each.name],)
        value = getattr(settings, each.name)
        if not all(kind in WORDS for kind in kinds) or isinstance(value, Unloaded):
            continue
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and bool not in kinds):
            words = " or ".join(WORDS[kind] for kind in kinds)
            raise UserError(f"--{each.name.replace('_', '-')} {value!r}: it must be {words}.")


WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "None"}

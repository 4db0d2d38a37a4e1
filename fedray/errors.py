"""What a user can name (a partition, a codec, a preset …) and the one clear message when the name is wrong."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(Exception):
    """A mistake of the user's: one sentence that says what was wrong, where, and what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a dead actor, no usable client). What was saved stays; exit code 1."""


def reason(error: Exception) -> str:
    """What an error of somebody else's code says, as a part of our sentence: its first line, without the period."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise `UserError` with the nearest name unless `name` is one of `names`."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "choose one."
        raise UserError(f"there is no {kind} {name!r}; {hint} There are: {', '.join(names)}.")


def pick(kind: str, text: str, menu: Mapping[str, type]) -> Any:
    """The object that a short form names: `"iid"`, or `"dirichlet:0.1"` and `"by-attribute:Smiling"` with values.

    `menu` maps names to dataclasses whose fields are numbers or strings. Raises `UserError`.
    """
    name, *values = text.split(":")
    check_name(kind, name, menu)
    fields = dataclasses.fields(menu[name])
    form = name + "".join(f":{field.name}" if _required(field) else f"[:{field.name}]" for field in fields)
    if not sum(map(_required, fields)) <= len(values) <= len(fields):
        raise UserError(f"{kind} {text!r} is not of the form {form!r}.")
    try:
        typed = [field.type(value) for field, value in zip(fields, values, strict=False)]  # type: ignore[operator]
    except ValueError:
        raise UserError(f"{kind} {text!r}: {', '.join(values)!r} is not a number (the form is {form!r}).") from None
    return menu[name](*typed)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING


def short(chosen: Any, menu: Mapping[str, type]) -> str:
    """The short form that `pick` reads; for an object that is not of the menu (a user's own), its repr."""
    for name, cls in menu.items():
        if type(chosen) is cls:
            fields = [field for field in dataclasses.fields(cls) if getattr(chosen, field.name) != field.default]
            values = [getattr(chosen, field.name) for field in fields]
            return ":".join([name, *(str(value).removesuffix(".0") for value in values)])
    return repr(chosen)

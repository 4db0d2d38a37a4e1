"""Errors that users see: the two kinds, and the nearest name to a wrong one."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: one sentence that says what was wrong, where, and what to do. Exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on (a dead actor, no usable client). What was saved stays; exit code 1."""


class Detached(KeyboardInterrupt):
    """Who follows a run on a Ray cluster was interrupted; the run goes on there."""


def reason(error: Exception) -> str:
    """Return the first line of another library's error, as a part of our sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")


def check_text(name: str) -> None:
    """Raise `UserError` for a name in other bytes than UTF-8, as Latin-1: tables, JSON and terminals have only text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="surrogateescape").decode(errors="backslashreplace")
        raise UserError(f"the name {shown} is not in UTF-8; rename it.") from None


def check_name(kind: str, name: str, names: Iterable[str]) -> None:
    """Raise `UserError` with the nearest name unless `name` is one of `names`."""
    names = list(names)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else "choose one."
        raise UserError(f"there is no {kind} {name!r}; {hint} There are: {', '.join(names)}.")

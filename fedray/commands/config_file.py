"""Files of settings: YAML or TOML as `fedray config` prints them, or a run's config.json.

A file is a command line in another form: its keys are flags, and what the command line says comes after it.
"""

import difflib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedray.commands import aliases
from fedray.commands.flags import Flag
from fedray.config import Config
from fedray.errors import UserError, reason
from fedray.files import read_json, read_text
from fedray.forms import WORDS, files_named
from fedray.record.upgrade import upgrade
from fedray.tasks.named import task_to_json

TRUE, FALSE, NONE = ("true", "yes", "on"), ("false", "no", "off"), ("none", "null", "~", "")
DURATION = ("local_epochs", "local_steps")  # of which one is given


def read(path: Path) -> dict[str, Any]:
    """Read a file's settings, a task's among them: text, numbers or lists of these, by name.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: there is no such file.")
    if path.suffix == ".json":
        values = read_json(path)
        if isinstance(values.get("config"), dict):  # a run's; it joins the cluster that the command line says
            values = upgrade(values["config"]) | {"address": None}
    elif path.suffix == ".toml":
        try:
            values = tomllib.loads(read_text(path))
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"--config {path} is no TOML: {reason(error)}.") from None
    elif path.suffix in (".yaml", ".yml"):
        values = _yaml(path)
    else:
        raise UserError(f"--config {path}: its name must end in .yaml, .toml or .json.")
    task = values.get("task")
    if isinstance(task, Mapping):
        values = {**values, **task, "task": task.get("class") or task.get("name")}
        values = {key: value for key, value in values.items() if key not in ("class", "name")}
    if str(values.pop("address", None)).lower() not in NONE:
        raise UserError(f"--config {path}: a cluster is joined by the command line; say --address there.")
    return {key.replace("-", "_"): value for key, value in values.items()}


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:  # all scalars as text: `no` is a precision, and 1e-4 a number
        values = yaml.load(read_text(path), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is no YAML: {reason(error)}.") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must hold settings, each in a line as rounds: 20.")
    return {str(key): value for key, value in values.items()}


def words(path: Path, values: Mapping[str, Any], flags: Sequence[Flag], arguments: Sequence[str]) -> list[str]:
    """Return the command line that a file's settings are.

    Args:
        flags: all that the command has.
        arguments: the rest of the command line, which comes after it.

    Raises:
        UserError: a setting is unknown, or of another kind; or it is code that the command line does not name.
    """
    by_field = {name.removeprefix("--").replace("-", "_"): f for f in flags for name in (f.name, *f.aliases)}
    given = {aliases.name_of(word).removeprefix("--").replace("-", "_") for word in arguments}
    found: list[str] = []
    for key, value in values.items():
        if key in given or (key in DURATION and given.intersection(DURATION)):
            continue
        flag = by_field.get(key)
        if flag is not None:
            found += _words(path, key, flag, value)
        elif (name := "--" + key.replace("_", "-")) in aliases.ALL:
            on = not isinstance(value, list) and str(value).lower() in TRUE
            found += [name] * on if name in aliases.SWITCHES else [name, str(value)]
        else:
            near = difflib.get_close_matches(key, [*by_field, *(n[2:].replace("-", "_") for n in aliases.ALL)], n=1)
            hint = f"did you mean {near[0]!r}?" if near else "--help-all lists them."
            raise UserError(f"--config {path}: there is no setting {key!r}; {hint}")
    check_code(path, found, arguments)
    return found


def check_code(path: Path, found: Sequence[str], arguments: Sequence[str]) -> None:
    """Raise `UserError` if what a file says names code that the command line does not name: it would run."""
    hidden = files_named(found) - files_named(arguments)
    if hidden:
        file = min(hidden)
        raise UserError(f"--config {path} names code in {file}: if you trust it, name the file again (--code {file}).")


def _words(path: Path, key: str, flag: Flag, value: Any) -> Iterator[str]:
    """Yield a flag and its values."""
    values = [_text(each) for each in (value if isinstance(value, list) else [value])]
    if flag.switch:
        if len(values) != 1 or values[0].lower() not in (*TRUE, *FALSE):
            raise UserError(f"--config {path}: {key} {value!r}: it must be true or false.")
        yield flag.name if values[0].lower() in TRUE else flag.name.replace("--", "--no-", 1)
        return
    if flag.several:
        truths = "bool" in str(flag.hint)
        yield from (flag.name, *(value.capitalize() if truths else value for value in values))
        return
    if len(values) != 1:
        raise UserError(f"--config {path}: {key} {value!r}: it must be one value.")
    (text,) = values
    if flag.optional and text.lower() in NONE:
        yield f"{flag.name}=None"
        return
    if flag.hint in (int, float):
        try:
            flag.hint(text)
        except ValueError:
            raise UserError(f"--config {path}: {key} {text!r}: it must be {WORDS[flag.hint]}.") from None
    yield f"{flag.name}={text}"


def _text(value: Any) -> str:
    return "None" if value is None else str(value)


def as_yaml(config: Config, flags: Sequence[Flag]) -> str:
    """Write all settings, a task's among them, as a file that reads back to the same configuration."""
    import yaml

    values = config.to_json()
    task = task_to_json(config.task)
    values |= task | {"task": task.get("class", task["name"])}
    names = ["task", *(flag.field for flag in flags if flag.field in values and flag.field not in ("task", "address"))]
    plain = json.loads(json.dumps({name: values[name] for name in names}, default=str))  # tuples are lists
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)

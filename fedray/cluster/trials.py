"""What a sweep runs: the configurations that a space of values asks for. Knows nothing of Ray."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from fedray.config import Config
from fedray.errors import UserError, check_name

Space = Mapping[str, Sequence[Any] | Callable[[Config], Any]]


def expand(base: Config, space: Space) -> list[Config]:
    """All combinations, the last name's values fastest; the same configuration counts once.

    Raises:
        UserError: a name is not a setting, or has no values.
    """
    found = [base]
    for name, values in space.items():
        if not callable(values) and not len(values):
            raise UserError(f"the sweep has no values for {name!r}.")
        found = [changed(config, name, value) for config in found for value in _values(values, config)]
    once = {config.sha256: config for config in reversed(found)}
    return [config for config in found if config is once[config.sha256]]


def _values(values: Sequence[Any] | Callable[[Config], Any], config: Config) -> Sequence[Any]:
    return [values(config)] if callable(values) else values


def changed(config: Config, name: str, value: Any) -> Config:
    """The configuration with one setting changed: a field of `Config`, or "task.FIELD".

    What has a short form (a partition, an algorithm …) may be given by it. Raises `UserError`.
    """
    names = [item.name for item in fields(Config) if item.name != "task"]
    names += [f"task.{item.name}" for item in fields(config.task)]  # type: ignore[arg-type]
    check_name("setting", name, names)
    if name.startswith("task."):
        return replace(config, task=replace(config.task, **{name.removeprefix("task."): value}))  # type: ignore[type-var]
    if name in ("local_epochs", "local_steps") and value is not None:
        config = replace(config, local_epochs=None, local_steps=None)
    return replace(config, **{name: value})


def settings_of(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """What a configuration has for these names, as JSON has it."""
    values = config.to_json()
    flat = values | {f"task.{name}": value for name, value in values["task"].items()}
    return {name: flat[name] for name in names}


def images_planned(config: Config, examples: int) -> int:
    """Images that a run trains on at most, with batches counted as full."""
    share = -(-examples // config.clients)
    batch = config.train_batch_size * config.gradient_accumulation_steps
    return config.rounds * config.cohort_size * config.steps(share) * batch

"""Trials of an experiment: the configurations that its space of values makes of a base. Without Ray."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from fedray.config import Config
from fedray.errors import UserError, check_name

# Values by the name of a `Config` field, or "task.FIELD"; or a function of the configuration so far, for a value that
# follows from the names before it, or a list of several. Seeds are a dimension like others.
Space = Mapping[str, Sequence[Any] | Callable[[Config], Any]]


@dataclass(frozen=True)
class Experiment:
    """A question, and the runs that answer it: every combination of the space's values, on top of `base`."""

    base: Config
    space: Space
    name: str = "sweep"
    question: str = ""


def expand(base: Config, space: Space) -> list[Config]:
    """Make all combinations of a space's values, the last name's fastest; equal configurations count once.

    Raises:
        UserError: a name is not a setting, or has no values.
    """
    configs = [base]
    for name, values in space.items():
        if not callable(values) and not len(values):
            raise UserError(f"the sweep has no values for {name!r}.")
        configs = [change(config, name, value) for config in configs for value in _values(values, config)]
    first: dict[str, Config] = {}
    for config in configs:
        first.setdefault(config.sha256, config)
    return list(first.values())


def _values(values: Sequence[Any] | Callable[[Config], Any], config: Config) -> Sequence[Any]:
    if not callable(values):
        return values
    found = values(config)
    return found if isinstance(found, list) else [found]


def change(config: Config, name: str, value: Any) -> Config:
    """Change one setting of a configuration: a field of `Config`, or "task.FIELD".

    What has a short form (a partition, an algorithm …) may be given by it. Raises `UserError`.
    """
    names = [item.name for item in fields(Config) if item.name != "task"]
    names += [f"task.{item.name}" for item in fields(config.task)]
    check_name("setting", name, names)
    if name.startswith("task."):
        return replace(config, task=replace(config.task, **{name.removeprefix("task."): value}))
    if name in ("local_epochs", "local_steps") and value is not None:
        config = replace(config, local_epochs=None, local_steps=None)
    return replace(config, **{name: value})


def settings_of(config: Config, names: Iterable[str]) -> dict[str, Any]:
    """Pick these settings of a configuration, as JSON has them."""
    values = config.to_json()
    flat = values | {f"task.{name}": value for name, value in values["task"].items()}
    return {name: flat[name] for name in names}


def images_planned(config: Config, examples: int) -> int:
    """Count the images that a run trains on at most, with batches counted as full."""
    share = -(-examples // config.clients)
    batch = config.train_batch_size * config.gradient_accumulation_steps
    return config.rounds * config.cohort_size * config.steps(share) * batch

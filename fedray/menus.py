"""Menus of the classes that users can name, and the conversion of settings from and to text."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from fedray.algorithms import Algorithm
from fedray.algorithms.folds import Fold
from fedray.data.partition import Partition
from fedray.forms import Menu, Unloaded, parse_all
from fedray.scores import networks
from fedray.vector.optimizer import Optimizer
from fedray.wire import Link

ALGORITHMS = Menu("algorithm", Algorithm, "fedray.algorithms")
FOLDS = Menu("fold", Fold, "fedray.algorithms.folds")
LINKS = Menu("link", Link, "fedray.wire")
PARTITIONS = Menu("partition", Partition, "fedray.data.partition")
EXACT: dict[str, tuple] = {"float32": ()}  # a wire without links


def word(parse: Callable[[str], Any], form: Callable[[Any], str], names: str) -> PrimitiveConstructorSpec:
    """Make the constructor by which tyro reads and shows a short form: `--partition dirichlet:0.1`."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=names,
        instance_from_str=lambda arguments: parse(arguments[0]),
        is_instance=lambda instance: True,
        str_from_instance=lambda instance: [form(instance)],
    )


def name_or_none(text: str) -> str | None:
    """Read a name, or None."""
    return None if text == "None" else text


def words_of(menu: Menu) -> PrimitiveConstructorSpec:
    return word(menu.parse, menu.form, "|".join(menu.classes))


def parse_wire(text: str, allowed: Collection[Path] | None = None) -> tuple[Link, ...]:
    """Make the links of a wire from short forms, separated by commas; `float32` is none."""
    return parse_all(LINKS, text, EXACT, allowed)


def wire_form(links: tuple[Link, ...]) -> str:
    """Return the inverse of `parse_wire`."""
    return ",".join(map(LINKS.form, links)) or "float32"


def saved_features(name: str | None, allowed: Collection[Path]) -> Any:
    """Return features that a run was scored on; of code (Python, TorchScript) that may not run, an `Unloaded`."""
    if name is None or not networks.network_of(name).runs_code or Path(name.partition(":")[0]).resolve() in allowed:
        return name
    return Unloaded("features", name)


def _optimizer(text: str, allowed: Collection[Path] | None) -> Optimizer:
    return Optimizer.parse(text)


# Settings that have a short form: how it is read, given the files that may run, and how it is written.
FORMS: dict[str, Any] = {
    "partition": PARTITIONS.parse, "algorithm": ALGORITHMS.parse, "fold": FOLDS.parse, "wire": parse_wire,
    "optimizer": _optimizer,
}  # fmt: skip
TEXTS: dict[str, Any] = {
    "partition": PARTITIONS.form, "algorithm": ALGORITHMS.form, "fold": FOLDS.form, "wire": wire_form,
    "optimizer": str,
    "features": lambda name: name and str(name),
}  # fmt: skip

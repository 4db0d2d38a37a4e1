"""Menus of the classes that users can name, and the conversion of settings from and to text."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from fedray.algorithms import Algorithm
from fedray.algorithms.attacks import Attack, Malicious
from fedray.algorithms.cohorts import Cohort
from fedray.algorithms.folds import Fold
from fedray.data.partition import Partition
from fedray.errors import UserError
from fedray.forms import Menu, Unloaded, parse_all
from fedray.scores import networks
from fedray.vector.optimizer import Optimizer
from fedray.wire import Link

ALGORITHMS = Menu("algorithm", Algorithm, "fedray.algorithms")
COHORTS = Menu("cohort", Cohort, "fedray.algorithms.cohorts")
FOLDS = Menu("fold", Fold, "fedray.algorithms")
ATTACKS = Menu("attack", Attack, "fedray.algorithms.attacks")
LINKS = Menu("link", Link, "fedray.wire")
PARTITIONS = Menu("partition", Partition, "fedray.data.partition")
EXACT: dict[str, tuple] = {"float32": ()}  # a wire without links


def word(parse: Callable[[str], Any], form: Callable[[Any], str | None], names: str) -> PrimitiveConstructorSpec:
    """Make the constructor by which tyro reads and shows a short form: `--partition dirichlet:0.1`."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=names,
        instance_from_str=lambda arguments: parse(arguments[0]),
        is_instance=lambda instance: True,
        str_from_instance=lambda instance: [str(form(instance))],
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


def parse_wire_down(text: str | None, allowed: Collection[Path] | None = None) -> tuple[Link, ...] | None:
    """Make the links of the way down, as `parse_wire`; None where it is as the wire has it."""
    return None if text in (None, "None") else parse_wire(text, allowed)


def wire_down_form(links: tuple[Link, ...] | None) -> str | None:
    """Return the inverse of `parse_wire_down`."""
    return None if links is None else wire_form(links)


def parse_malicious(text: str | None, allowed: Collection[Path] | None = None) -> Malicious | None:
    """Make attackers of SHARE:ATTACK, as in 0.2:signflip; None for none."""
    if text in (None, "None"):
        return None
    share, _, attack = text.partition(":")
    try:
        return Malicious(float(share), ATTACKS.parse(attack, allowed))
    except ValueError:
        raise UserError(f"--malicious {text!r} is not of the form SHARE:ATTACK, as in 0.2:signflip.") from None


def malicious_form(chosen: Malicious | None) -> str | None:
    """Return the inverse of `parse_malicious`."""
    return None if chosen is None else f"{chosen.share}:{ATTACKS.form(chosen.attack)}"


def parse_cohort(text: str, allowed: Collection[Path] | None = None) -> Cohort | None:
    """Make a cohort from its short form; None is a fraction of the clients."""
    return None if text in (None, "None") else COHORTS.parse(text, allowed)


def cohort_form(cohort: Cohort | None) -> str:
    """Return the inverse of `parse_cohort`."""
    return "None" if cohort is None else COHORTS.form(cohort)


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
    "cohort": parse_cohort, "wire_down": parse_wire_down, "malicious": parse_malicious, "optimizer": _optimizer,
}  # fmt: skip
TEXTS: dict[str, Any] = {
    "partition": PARTITIONS.form, "algorithm": ALGORITHMS.form, "fold": FOLDS.form, "wire": wire_form,
    "cohort": lambda cohort: cohort and cohort_form(cohort),
    "wire_down": wire_down_form, "malicious": malicious_form,
    "optimizer": str,
    "features": lambda name: name and str(name),
}  # fmt: skip

"""The rooms of CONTRIBUTING.md: a folder imports only from those above it, and inside a folder there are no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fedray

PACKAGE = Path(fedray.__file__).parent
ROOMS = [
    *("errors", "own", "forms", "seeds", "files", "vector", "data", "tasks", "algorithms", "wire", "scores", "menus"),
    *("config", "presets", "record", "federation", "reports", "cluster", "commands", "cli", "__main__"),
]
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imported(name):
    """Dotted names of all that a file imports, also inside functions; of fedray's own, without `fedray.`."""
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("fedray.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}".removeprefix("fedray.")
                yield dotted if dotted in FILES else str(node.module).removeprefix("fedray.")


def room(name):
    return ROOMS.index(name.split(".")[0])


def test_every_file_has_a_room():
    assert {name.split(".")[0] for name in FILES} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_only_from_rooms_above(name):
    for module in imported(name):
        if module in FILES:
            assert room(module) <= room(name), f"{name} imports {module}"


def test_no_circles_inside_a_room():
    TopologicalSorter({name: {module for module in imported(name) if module in FILES} for name in FILES}).prepare()


def test_only_the_cluster_room_imports_ray():
    users = {name for name in FILES if any(module.split(".")[0] == "ray" for module in imported(name))}
    assert users
    assert {name.split(".")[0] for name in users} == {"cluster"}

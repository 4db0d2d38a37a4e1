"""The layer order of CONTRIBUTING.md: a file imports only from layers before it, or from before it in its own."""

import ast
from pathlib import Path

import pytest

import fedray

PACKAGE = Path(fedray.__file__).parent
ORDER = [
    *("choices", "seeds", "vector", "images"),
    *("data", "partition", "partition_report", "cohort", "codecs", "rules", "tasks", "tasks.ddpm", "tasks.embedded"),
    *("scores", "scores.frechet", "scores.digits"),
    *("config", "client", "record"),
    *("pools", "federation", "results"),
    "actors",
    *("cli", "__main__"),
]
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imported(path):
    """Dotted names of all that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                yield dotted if dotted.removeprefix("fedray.") in FILES else node.module


def test_every_file_has_a_place():
    assert set(FILES) - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("name", sorted(set(FILES) - {"__init__"}))
def test_imports_only_from_before(name):
    for module in imported(FILES[name]):
        if module.startswith("fedray."):
            assert ORDER.index(module.removeprefix("fedray.")) < ORDER.index(name), f"{name} imports {module}"


def test_only_the_edge_imports_ray():
    users = {name for name, path in FILES.items() if any(m.split(".")[0] == "ray" for m in imported(path))}
    assert users <= {"actors", "sweep"}
    assert "actors" in users

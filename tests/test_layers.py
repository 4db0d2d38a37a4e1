"""The layer order of CONTRIBUTING.md: a file imports only from layers before it, or from before it in its own."""

import ast
from pathlib import Path

import pytest

import fedray

PACKAGE = Path(fedray.__file__).parent
ORDER = [
    *("choices", "seeds", "vector", "cache", "images"),
    *("data", "partition", "partition_report", "cohort", "codecs", "rules", "lora", "lora_rules"),
    *("tasks", "tasks.images", "tasks.ddpm", "tasks.pretrained"),
    *("tasks.captions", "tasks.stable_diffusion", "tasks.lora", "tasks.embedded"),
    *("scores", "scores.frechet", "scores.kid", "scores.prdc", "scores.nearest", "scores.digits"),
    *("scores.networks", "scores.reference", "scores.scoring"),
    *("config", "model_card", "presets", "worker", "client", "drawing", "record"),
    *("plan", "pools", "evaluation", "federation", "results", "tables"),
    *("answer", "charts", "report", "space"),
    *("actors", "local_only", "sweep"),
    *(
        "commands",
        "commands.terminal",
        "commands.settings",
        "commands.train",
        "commands.finetune",
        "commands.sample",
        "commands.evaluate",
    ),
    *("commands.sweep", "commands.report"),
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

"""The rooms of CONTRIBUTING.md: a folder imports only from those above it, and inside a folder there are no circles."""

import ast
import json
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import fedray
from fedray import cli

PACKAGE = Path(fedray.__file__).parent
ROOMS = [
    *("errors", "lazy", "memory", "own", "forms", "seeds", "files", "cache", "shelf", "storage", "vector", "data"),
    *("tasks", "algorithms", "wire", "scores", "menus", "privacy", "checks", "federated"),
    *("config", "presets", "record", "federation", "reports", "cluster", "commands", "cli", "__main__"),
]
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
    if path != PACKAGE / "__init__.py"
}


def imported(name):
    """Dotted names of all that a file imports, also inside functions; of fedray's own, without `fedray.`."""
    tree = ast.parse(FILES[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # is never run
    for node in ast.walk(tree):
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


def test_every_wait_for_another_process_has_a_deadline():
    """Of Ray, of a command; of a thread, a lock or a queue none that has no argument."""
    found = []
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in ("ray.get", "ray.wait", "subprocess.run"):
                found.append(called)
                assert "timeout" in {keyword.arg for keyword in node.keywords}, f"{name}, line {node.lineno}"
            if called.split(".")[-1] in ("join", "wait", "acquire", "get", "communicate", "flock"):
                assert node.args or node.keywords, f"{name}, line {node.lineno}"
            if called == "fcntl.flock":
                found.append(called)
                assert "LOCK_NB" in ast.unparse(node.args[1]), f"{name}, line {node.lineno}"
    assert set(found) == {"ray.get", "ray.wait", "subprocess.run", "fcntl.flock"}


def test_a_reader_can_hold_a_file_and_a_function_in_mind():
    for name, path in FILES.items():
        text = path.read_text()
        assert len(text.splitlines()) <= 350, f"{name} is long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                own = [argument for argument in every if argument.arg not in ("self", "cls")]
                assert len(own) <= 7, f"{name}: {node.name} has {len(own)} parameters"


def test_no_code_asks_for_a_concrete_task_algorithm_or_link():
    """What a part needs and another offers is compared in one place, `checks._check_fit`."""
    from fedray import menus
    from fedray.tasks.named import OURS

    concrete = {cls for _, cls in OURS.values()}
    concrete |= {cls.__name__ for menu in (menus.ALGORITHMS, menus.FOLDS, menus.LINKS) for cls in menu.classes.values()}
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "isinstance":
                asked = {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
                assert not asked & concrete, f"{name}, line {node.lineno}"


@pytest.mark.parametrize(
    "command",
    cli.COMMANDS,
)
@pytest.mark.parametrize("arguments", [["--help"], ["--bogus"]])
def test_help_and_mistakes_need_neither_torch_nor_ray(command, arguments):
    assert not {"torch", "ray", "pandas"} & loaded_by(f"cli.main({[command, *arguments]!r})", "fedray.cli as cli")


def test_a_process_imports_what_its_task_needs():
    """An actor of a task of the user's own; the digits' network adds diffusers."""
    heavy = {
        "diffusers",
        "transformers",
        "peft",
        "torchvision",
        "pandas",
        "matplotlib",
        "scipy",
        "sklearn",
        "tensorboardX",
    }
    assert not heavy & loaded_by("pass", "fedray.cluster.driver, fedray.federation.local")


def loaded_by(code, modules):
    """Packages that a new process has imported after it ran some code."""
    tail = "import sys, json; print(json.dumps(list({name.split('.')[0] for name in sys.modules})))"
    code = f"import {modules}\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{tail}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))

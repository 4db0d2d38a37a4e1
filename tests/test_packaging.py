"""What is said of the package: licence, citation, versions."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import yaml

import fedray

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = (ROOT / "requirements.lock").read_text()


def name_of(requirement):
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_licence_citation_and_package_agree():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert said["version"] == PROJECT["version"] == fedray.__version__
    assert said["license"] == PROJECT["license"]
    assert said["authors"] == PROJECT["authors"]
    licence = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in licence
    assert "the fedray authors" in licence
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_all_that_is_required_is_locked_with_hashes():
    extras = PROJECT["optional-dependencies"]
    of_dev = re.search(r"fedray\[([^]]*)\]", extras["dev"][0])[1].split(",")
    wanted = [*PROJECT["dependencies"], *extras["dev"][1:], *(each for extra in of_dev for each in extras[extra])]
    blocks = re.findall(r"^(\S+)==\S+.*\\\n((?:    --hash=sha256:[0-9a-f]{64}.*\n)+)", LOCK, flags=re.MULTILINE)
    assert {name_of(each) for each in wanted} <= {name_of(name) for name, _ in blocks}
    assert len(blocks) == len(re.findall(r"^\S", LOCK, flags=re.MULTILINE))


def test_the_lock_names_no_index():
    assert "://" not in LOCK
    assert "index" not in LOCK


def test_all_that_is_imported_is_required():
    required = {name_of(each) for each in PROJECT["dependencies"]}
    required |= {name_of(each) for extra in PROJECT["optional-dependencies"].values() for each in extra}
    required |= {"ipython"}  # only in a notebook, which has it
    imported = set()
    for path in Path(fedray.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {each.name.partition(".")[0] for each in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    names = packages_distributions()
    imported -= {"fedray", *sys.stdlib_module_names}
    assert len(imported) > 20
    for module in imported:
        assert {name_of(each) for each in names.get(module, [module])} & required, module

"""The wheel, made of the source distribution, without the checkout: what pages tell new users runs as it stands there.

Its environment has no fedray but the wheel's; what fedray needs comes from this one's.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r'^```(sh|python)(?: title="([^"\n]*)")?\n(.*?)^```', flags=re.MULTILINE | re.DOTALL)
BUILD = "import setuptools.build_meta as made, sys; made.build_sdist(sys.argv[1])"

pytestmark = pytest.mark.slow


def done(*command, cwd, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, **options)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    root = tmp_path_factory.mktemp("wheel")
    copy = root / "copy"
    shutil.copytree(ROOT / "fedray", copy / "fedray", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    done(sys.executable, "-c", BUILD, root, cwd=copy)
    (sdist,) = root.glob("fedray-*.tar.gz")
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", root]
    done(sys.executable, "-m", "pip", "wheel", *flags, sdist, cwd=root)
    (made,) = root.glob("fedray-*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel):
    """A directory with an environment `.venv` that the wheel is installed into."""
    place = wheel.parent / "place"
    venv.create(place / ".venv", symlinks=True)
    python = place / ".venv/bin/python"
    done(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=place)
    (packages,) = (place / ".venv").glob("lib/python*/site-packages")
    (packages / "of_this_environment.pth").write_text(sysconfig.get_path("purelib"))
    found = "import fedray, importlib.metadata as m; of = m.metadata('fedray')"
    said = done(
        python, "-c", f"{found}; print(fedray.__file__, of['License-Expression'], of['License-File'])", cwd=place
    )
    assert said.split() == [str(packages / "fedray/__init__.py"), "Apache-2.0", "LICENSE"]
    return place


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(["git", "ls-files", "fedray"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert names == set(tracked)


@pytest.mark.parametrize("page", ["start", "method"])
def test_every_step_of_a_page_for_new_users_runs(environment, page):
    blocks = BLOCK.findall((ROOT / f"docs/{page}.md").read_text())
    commands = 0
    for language, title, text in blocks:
        if language == "python":
            (environment / title).write_text(text)
        for command in text.strip().splitlines() if language == "sh" else []:
            if command.startswith(".venv/bin/fedray "):
                alone = " --actors 0" if page == "method" and " train --algorithm" in command else ""  # saves time
                done("bash", "-c", command + alone, cwd=environment, timeout=500)
                commands += 1
    assert commands >= 3
    if page == "start":
        done(".venv/bin/python", "first.py", cwd=environment, timeout=500)
        for run, rounds in (("first", 4), ("python", 3)):
            assert json.loads((environment / f"runs/{run}/result.json").read_text())["rounds"] == rounds
        assert "Do more clients make the model worse?" in (environment / "runs/question/report.html").read_text()
    else:
        settings = json.loads((environment / "runs/prox/config.json").read_text())
        assert "FedProx" in json.dumps(settings)

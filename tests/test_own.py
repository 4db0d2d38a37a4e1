"""A user's own files: how they are loaded, what is said if they do not run, and that their classes reach Ray."""

import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from runs import CHAOS

import fedray
from fedray.cluster.pool import RayPool
from fedray.commands.sweep import load_experiment
from fedray.errors import UserError
from fedray.federation.evaluation import sample
from fedray.federation.pool import LocalPool
from fedray.federation.sampling import Sampling
from fedray.federation.worker import model as model_of
from fedray.own import load_file, loaded

EXPERIMENT = '''"""Does it load?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

import fedray
from fedray.data.partition import Partition, Shards


@dataclass(frozen=True)
class Strided(Partition):
    """Client k holds examples k, k + clients and so on, at most `most` of them."""

    name: ClassVar[str] = "strided"
    most: int = 7

    def split(self, dataset, clients, rng):
        parts = [np.arange(client, len(dataset), clients)[: self.most] for client in range(clients)]
        return Shards(np.concatenate(parts), np.arange(clients + 1) * self.most)


def brightness(samples, images):
    return brightest(samples) / 255


def brightest(samples):
    return float(samples.max())


BASE = fedray.PRESETS["digits"]
SPACE = {"seed": [0, 1]}
'''


@pytest.fixture
def file(tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    return tmp_path / "mine.py"


def test_a_dataclass_whose_annotations_are_strings(file):
    """Defect: dataclasses look up `ClassVar` in sys.modules, where the experiment was not."""
    module = load_experiment(file)
    assert [field.name for field in fields(module.Strided)] == ["most"]
    assert sys.modules[module.__name__] is module


def test_a_file_runs_once(file, tmp_path, monkeypatch):
    module = load_file(file)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(file)
    assert load_file("mine.py") is load_file("link.py") is module
    assert loaded().count(module) == 1


def test_files_of_one_name_are_two_modules(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"WHERE = {folder!r}\n")
    assert [load_file(tmp_path / folder / "same.py").WHERE for folder in ("a", "b")] == ["a", "b"]


def test_a_file_imports_its_neighbours_also_later(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 3\n")
    (tmp_path / "late.py").write_text("def value():\n    from neighbour_of_mine import VALUE\n    return VALUE\n")
    assert load_file(tmp_path / "late.py").value() == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = 1\nb = 1 / 0\n", ", line 2: ZeroDivisionError: division by zero."),
        ("def f():\n    return 1 / 0\n\n\nf()\n", ", line 2: ZeroDivisionError: division by zero."),
        (
            "import fedray\n\nx = fedray.nothing\n",
            ", line 3: AttributeError: No fedray attribute nothing.",
        ),
        ("a = 1\n\nfor\n", ", line 3: SyntaxError: invalid syntax."),
        ("import json\n\njson.loads('{')\n", ", line 3: JSONDecodeError: Expecting property name"),
        ("import broken_neighbour\n", ", line 1: SyntaxError: invalid syntax."),
        (
            "\nfrom fedray.errors import check_name\ncheck_name('wire', 'x', ['y'])\n",
            ", line 3: there is no wire 'x'; choose one.",
        ),
    ],
)
def test_an_error_names_the_file_and_its_line(tmp_path, text, message):
    (tmp_path / "broken_neighbour.py").write_text("\n\n\nfor\n")
    path, before = tmp_path / "wrong.py", (set(sys.modules), loaded())
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_file(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert not [name for name in set(sys.modules) - before[0] if name.startswith("fedray_own")]
    assert loaded() == before[1]
    path.write_text("FIXED = True\n")
    assert load_file(path).FIXED


def test_what_is_not_a_python_file(tmp_path):
    with pytest.raises(UserError, match="there is no file .*nothing.py"):
        load_file(tmp_path / "nothing.py")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="notes.txt is not a Python file; its name must end in .py"):
        load_file(tmp_path / "notes.txt")


@pytest.mark.slow
def test_a_files_classes_reach_client_actors(ray, toy_config, file):
    config = toy_config(partition=load_file(file).Strided(), actors=1)
    model, sampling = model_of({"model": torch.zeros(16)}), Sampling.of(config, 4)
    pool = RayPool.start(config)  # each actor is given the configuration
    try:
        there = sample(pool, model, sampling)[1]
    finally:
        pool.close()
    assert np.array_equal(there, sample(LocalPool(config), model, sampling)[1])


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("actors", [0, 1] if CHAOS else [1])
def test_a_files_classes_and_functions_reach_trials(ray, toy_config, tmp_path, file, actors):
    module = load_file(file)
    config = toy_config(partition=module.Strided(), actors=actors)
    done = fedray.sweep(
        fedray.Experiment(config, {"seed": [0]}), tmp_path / "sweep", metrics={"brightness": module.brightness}
    )
    assert not done.missing
    run = fedray.run(replace(config, actors=0), tmp_path / "here", metrics={"brightness": module.brightness})
    assert done.runs[0].result["vector_sha256"] == run.result["vector_sha256"]
    assert done.runs[0].rows[-1]["scores"] == run.rows[-1]["scores"]
    assert run.rows[-1]["examples"] == 4 * 7


@pytest.mark.slow
def test_a_files_classes_and_functions_reach_the_driver(ray, toy_config, tmp_path, file):
    module = load_file(file)
    config = toy_config(partition=module.Strided(), actors=1)
    run = fedray.run(config, tmp_path / "run", metrics={"brightness": module.brightness})
    assert 0 < run.rows[-1]["scores"]["brightness"]["value"] <= 1

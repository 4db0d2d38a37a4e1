"""Sweeps on Ray Tune that list all there is in the menus of methods, folds and links; their tables and reports."""

import json
import re

import memory
import pandas as pd
import pytest

from fedray import menus
from fedray.cli import main

HEAD = """
from memory import Memory
from toy import Toy, ToyAdapters

from fedray.config import Config

settings = dict(
    clients=3, rounds=1, local_steps=1, train_batch_size=4, learning_rate=0.01, optimizer="sgd", max_grad_norm=None,
    evaluate_samples=0, actors=0,
)
"""
WHOLE = [
    "fedavg", "fedavgm", "fedadagrad:0.1", "fedadam:0.01", "fedyogi:0.01", "fedprox:0.1", "fedprox-adaptive",
    "scaffold", "scaffold:1", "fednova", "split:^0", "ema:0.9:scaffold", "ditto:0.5", "dpsgd:1:1",
    "dpsgd:1:1:fedadam:0.01",
]  # fmt: skip
ADAPTERS = ["ffa", "rolora", "svd", "fedex", "flora", "flora:warm=true", "raflora"]
FOLDS = ["mean", "median", "trimmed:0.34", "krum:0", "multikrum:0:2", "normbound:0.05", "secure:0.7"]
WIRES = [
    "float32", "float16", "bfloat16", "int8", "topk:0.5", "randk:0.5", "feedback:topk:0.5", "clip:0.3",
    "clip:0.3,noise:0.5", "feedback:randk:0.5:false,float16",
]  # fmt: skip
SWEEPS = {
    "algorithm": ("Memory()", WHOLE),
    "rule": ("ToyAdapters(labels=3)", ADAPTERS),
    "fold": ("Toy(labels=3)", FOLDS),
    "wire": ("Toy(labels=3)", WIRES),
}


@pytest.mark.parametrize(
    ("menu", "forms"), [(menus.ALGORITHMS, WHOLE + ADAPTERS), (menus.FOLDS, FOLDS), (menus.LINKS, WIRES)]
)
def test_all_entries_of_the_menus_are_here(menu, forms):
    assert set(menu.classes) <= {name for form in forms for name in re.split("[:,]", form)}


@pytest.mark.slow
@pytest.mark.parametrize("axis", SWEEPS)
def test_all_of_a_menu(tmp_path, monkeypatch, ray, capsys, axis):
    ray.cloudpickle.register_pickle_by_value(memory)
    monkeypatch.chdir(tmp_path)
    (task, forms), setting = SWEEPS[axis], "algorithm" if axis == "rule" else axis
    script = f'{HEAD}\nBASE = Config(task={task}, **settings)\nSPACE = {{"{setting}": {forms!r}}}\n'
    (tmp_path / "every.py").write_text(script)
    assert main(["sweep", "every.py", "--out", "runs"]) == 0, capsys.readouterr().err
    record = json.loads((tmp_path / "runs/every.sweep.json").read_text())
    named = {trial["changes"][setting] for trial in record["trials"]}
    assert len(named) == len(forms)
    assert {menus.FORMS[setting](form, None) for form in forms} == {menus.FORMS[setting](form, None) for form in named}
    table = pd.read_csv("runs/every.csv", dtype=str)
    assert set(table[setting]) == named
    assert table["loss"].astype(float).gt(0).all()
    assert main(["report", "runs", "--out", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(form.split(":")[0] in page for form in named)

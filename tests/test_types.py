"""Public names as type checkers and editors see them."""

import inspect
import os
import subprocess
import sys

import pytest

import fedray

SCRIPT = """
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import fedray


@dataclass(frozen=True)
class FedProx(fedray.Algorithm):
    mu: float

    def correct(
        self, gradient: Tensor, weights: Tensor, down: dict[str, Tensor], memory: dict[str, Tensor]
    ) -> None:
        gradient.add_(weights - down["model"], alpha=self.mu)


config = fedray.Config(clients=2, local_epochs=1, algorithm=FedProx(0.1), partition=fedray.Dirichlet(0.5))
run: fedray.Run = fedray.run(config, "runs/one", on_row=lambda row: print(row["loss"]))
sweep = fedray.sweep(fedray.Experiment(config, {"clients": [2, 4]}), "runs/sweep")
complete: list[fedray.Run] = sweep.runs


class Budget(fedray.Callback):
    def __init__(self) -> None:
        self.sent = 0

    def on_round(self, row: dict[str, Any]) -> str | None:
        self.sent += row["bytes_up"]
        return "enough" if self.sent > 10**9 else None


class Lines:
    path = Path()

    def start(self, run: fedray.Tracked) -> int | None:
        self.path = run.directory / "lines.txt"
        return None

    def log(self, entry: fedray.Entry) -> None:
        with open(self.path, "a") as file:
            file.write(f"{entry.round} {entry.scalars['loss']}")

    def finish(self) -> None:
        pass


tracker: fedray.Tracker = Lines()
stopping = [Budget(), fedray.EarlyStopping("fd[digits]", patience=5)]
tracked = fedray.run(config, "runs/two", callbacks=stopping, report_to=["wandb", tracker])
print(tracked.scores.loc["fd[digits]"], tracked.frame["loss"])
tracked.samples.save("samples.png")
picture = fedray.grid(tracked.sample(8))
"""
WRONG = {
    'fedray.Config(clients="four")': "arg-type",
    "fedray.run(fedray.Config())": "call-arg",
    "fedray.run(fedray.Config(), 'out').nothing": "attr-defined",
    "fedray.swep": "attr-defined",
    "fedray.run(fedray.Config(), 'out', report_to=[1])": "list-item",
    "fedray.run(fedray.Config(), 'out', callback=[])": "call-arg",
}


@pytest.mark.slow
def test_a_users_script_passes_strict_checks(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text("import fedray\n" + "\n".join(WRONG))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", os.devnull, "script.py", "wrong.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if not line.startswith("wrong.py:")]
    assert said == [f"Found {len(WRONG)} errors in 1 file (checked 2 source files)"], done.stdout + done.stderr
    for line, (text, code) in enumerate(WRONG.items(), start=2):
        assert any(said.startswith(f"wrong.py:{line}:") and code in said for said in done.stdout.splitlines()), text


def test_names_are_listed_and_have_signatures():
    names = set(dir(fedray))
    assert {"run", "sweep", "Config", "Run", "Algorithm", "Link", "Fold", "LoRA", "image_folder", "load"} <= names
    for name in names - {"PRESETS", "SMOKE"}:
        assert getattr(fedray, name) is not None
    assert list(inspect.signature(fedray.run).parameters)[:2] == ["config", "out"]
    assert list(inspect.signature(fedray.sweep).parameters)[:2] == ["experiment", "out"]


def test_importing_the_package_imports_neither_torch_nor_ray():
    code = "import fedray, sys; dir(fedray); print(sorted({'torch', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"

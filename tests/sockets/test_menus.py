"""A file with one class in a folder of the package is all that a new method needs: tried in a copy of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fedray

ALGORITHM = '''"""Half a step."""

from dataclasses import dataclass

from fedray.algorithms import Algorithm


@dataclass(frozen=True)
class Damped(Algorithm):
    """w + share (mean - w)."""

    share: float = 0.5

    def aggregate(self, server, folded, round):
        return server | {"model": server["model"].lerp(folded.mean("model"), self.share)}
'''
LINK = '''"""Twice the bytes."""

from dataclasses import dataclass

from fedray.wire import Link


@dataclass(frozen=True)
class Float64(Link):
    """Weights in double precision: exact."""

    def encode(self, x, memory, round, client):
        return x.double(), {}

    def decode(self, payload, round):
        return payload.float()
'''
TOY = Path(__file__).parents[1] / "toy.py"
EXPERIMENT = f"""
import fedray
from fedray.own import load_file
BASE = fedray.Config(task=load_file({str(TOY)!r}).Toy(), local_steps=1, rounds=1, evaluate_samples=0)
SPACE = {{"algorithm": ["fedavg", "damped:0.25"]}}
"""


@pytest.mark.slow
def test_a_file_in_a_folder_is_enough(tmp_path):
    shutil.copytree(Path(fedray.__file__).parent, tmp_path / "fedray")
    (tmp_path / "fedray/algorithms/damped.py").write_text(ALGORITHM)
    (tmp_path / "fedray/wire/float64.py").write_text(LINK)
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "300"}

    def run(command):
        done = subprocess.run(
            [sys.executable, "-m", "fedray", *command.split()], cwd=tmp_path, env=environment, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "damped|" in run("train --help-all").replace("\n", "").replace(" ", "")
    short = f"--task {TOY}:Toy --features None --rounds 2 --local-steps 1 --evaluate-samples 0 --actors 0"
    run(f"train {short} --algorithm damped:0.25 --wire float64 --out run")
    saved = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert (saved["algorithm"], saved["wire"]) == ("damped:0.25", "float64")
    row = json.loads((tmp_path / "run/rounds.jsonl").read_text().splitlines()[0])
    assert row["bytes_up"] == 2 * row["bytes_down"]
    result = (tmp_path / "run/result.json").read_text()
    (tmp_path / "run/result.json").unlink()
    rows = (tmp_path / "run/rounds.jsonl").read_text()
    (tmp_path / "run/rounds.jsonl").write_text(rows[: rows.index("\n") + 1])  # as a kill before the last row leaves it
    run(f"train --resume run --code {TOY}")
    assert json.loads((tmp_path / "run/result.json").read_text())["state_sha256"] == json.loads(result)["state_sha256"]
    assert "damped:0.25" in run("sweep experiment.py --out sweep")

"""How long does fedray take to start?

    python experiments/bench/start.py

--help, the import of what a driver needs, and from the command to the first row of the digits preset, in one process
and on two actors of a private Ray. Each is a new process; the floor is torch and Ray alone.
"""

import subprocess
import sys
import tempfile
import time

import tyro
from measure import spread, table

FEDRAY = [sys.executable, "-m", "fedray"]
TRAIN = [*FEDRAY, "train", "--preset", "digits", "--rounds", "1", "--evaluate-samples", "0"]
WHAT = {
    "fedray train --help": [*FEDRAY, "train", "--help"],
    "a mistake: fedray train --clients 0": [*FEDRAY, "train", "--clients", "0"],
    "import torch, ray": [sys.executable, "-c", "import torch, ray"],
    "import fedray.cluster.driver": [sys.executable, "-c", "import fedray.cluster.driver"],
    "first row, one process": [*TRAIN, "--actors", "0"],
    "first row, two actors": [*TRAIN, "--actors", "2"],
}
GOALS = {
    "fedray train --help": "1.0",
    "import fedray.cluster.driver": "2.5",
    "first row, one process": "5",
    "first row, two actors": "12",
}


def seconds(command: list[str]) -> float:
    """Time a command: a run until its first row stands on the terminal, all else to its end."""
    with tempfile.TemporaryDirectory() as directory:
        runs = "--actors" in command
        command = [*command, "--out", f"{directory}/run"] if runs else command
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if runs and "round 1/1" in line:
                break
        else:
            if runs:
                raise SystemExit(f"{' '.join(command)} ended without a row")
        took = time.perf_counter() - started
        process.stdout.read()
        process.wait()
        return took if runs else time.perf_counter() - started


def main(repeats: int = 5) -> None:
    """Measure.

    Args:
        repeats: how often each is measured, in turns.
    """
    found: dict[str, list[float]] = {name: [] for name in WHAT}
    for _ in range(repeats):
        for name, command in WHAT.items():
            found[name].append(seconds(command))
    table(["", "seconds", "goal"], [[name, spread(times), GOALS.get(name, "")] for name, times in found.items()])


if __name__ == "__main__":
    tyro.cli(main)

"""How long does fedray take to start?

    python experiments/bench/start.py

--help, the import of what a driver needs, and from the command to the first row of the digits preset, in one process
and on two actors of a private Ray. Each is a new process; the floor is torch and Ray alone.

Then a sweep of 20 short trials (`fedray.sweep` on Ray Tune: seeds of the digits preset, one round of one step, no
samples; as many at a time as there are cores) and one of a single trial, on a Ray that has started: what a further
trial takes of the sweep's time, and what its round and checkpoint take by its own row.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

import tyro
from measure import spread, table

import fedray
from fedray.cluster.connection import connected

TRIALS = 20
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


def sweep(trials: int) -> tuple[float, float]:
    """Return the seconds of a sweep of short trials, and the median of what a trial's round took."""
    config = replace(
        fedray.PRESETS["digits"], rounds=1, local_epochs=None, local_steps=1, evaluate_samples=0, features=None
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        done = fedray.sweep(fedray.Experiment(config, {"seed": list(range(trials))}), directory)
        took = time.perf_counter() - started
        assert len(done.runs) == trials
        seconds = [run.rows[0]["seconds"] for run in done.runs]
        return took, statistics.median(of["round"] + of["save"] for of in seconds)


def main(repeats: int = 5, trials: int = TRIALS, sweeps: int = 3) -> None:
    """Measure.

    Args:
        repeats: how often each is measured, in turns.
        trials: of a sweep.
        sweeps: how often it is measured.
    """
    found: dict[str, list[float]] = {name: [] for name in WHAT}
    for _ in range(repeats):
        for name, command in WHAT.items():
            found[name].append(seconds(command))
    table(["", "seconds", "goal"], [[name, spread(times), GOALS.get(name, "")] for name, times in found.items()])
    single, whole, each, rounds = list[float](), list[float](), list[float](), list[float]()
    with connected(None):
        sweep(1)  # starts Tune
        for _ in range(sweeps):
            single.append(sweep(1)[0])
            took, of_round = sweep(trials)
            whole.append(took)
            each.append((took - single[-1]) / (trials - 1))
            rounds.append(of_round)
    header = ["a sweep of short trials", "of 1, s", f"of {trials}, s", "each further trial, s", "its round, s"]
    table(header, [["", spread(single), spread(whole), spread(each), spread(rounds)]])


if __name__ == "__main__":
    tyro.cli(main)

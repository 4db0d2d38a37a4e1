"""The memory of a node is full: Ray's own monitor ends processes, for real."""

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toy
from killing import needs_mounts
from runs import sha, train

from fedray.record.run import Run

pytestmark = pytest.mark.slow
TOY = Path(toy.__file__)

# On a machine of 3.5 GB, of which nothing is used but by this run: what others do does not count.
SCRIPT = """
import pickle, subprocess, sys, threading, time
from functools import partial
from pathlib import Path
import psutil

TOTAL, place = 3_500_000, Path(sys.argv[3])  # kB

def private(process):
    resident, shared = map(int, Path(f"/proc/{process.pid}/statm").read_text().split()[1:3])
    return 4 * (resident - shared)

def tell():
    used = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            used += private(process)
        except OSError:
            pass
    free = max(0, TOTAL - used)
    lines = {"MemTotal": TOTAL, "MemFree": free, "MemAvailable": free, "Buffers": 0, "Cached": 0, "Shmem": 0}
    file.seek(0)
    file.write("".join(f"{name + ':':16}{value:9} kB\\n" for name, value in lines.items()))
    file.flush()

with open(place, "w") as file:
    tell()
    subprocess.run(["mount", "--bind", str(place), "/proc/meminfo"], check=True)
    threading.Thread(target=lambda: [(tell(), time.sleep(0.05)) for _ in iter(int, 1)], daemon=True).start()
    import fedray, toy, ray
    # Ray takes its own shares from what is used of the whole machine, by its cgroup.
    ray.init = partial(ray.init, _memory=1_000_000_000, object_store_memory=100_000_000)
    ray.cloudpickle.register_pickle_by_value(toy)
    fedray.run(pickle.load(open(sys.argv[1], "rb")), sys.argv[2])
"""


def environment(**changes):
    ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_memory")}
    return ours | {"PYTHONPATH": os.pathsep.join([str(TOY.parent), *sys.path])} | changes


@pytest.mark.timeout(600)
@needs_mounts
def test_a_client_that_fills_the_memory_of_its_node_is_left_out_and_nobody_else(toy_config, tmp_path):
    """First beside others, then alone, then with one actor in place of two."""
    settings = {"labels": 6, "rounds": 2, "evaluate_samples": 0}
    train(toy_config(failing=(1,), **settings), tmp_path / "quiet")
    config = toy_config(greedy=(1,), greed=3_500_000_000, actors=2, **settings)
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(config))
    command = ["unshare", "-rm", sys.executable, "-c", SCRIPT, "config.pickle", "run", "meminfo"]
    ran = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=540, check=False
    )
    assert ran.returncode == 0, ran.stderr
    first, second = Run.open(tmp_path / "run").rows
    for row in (first, second):
        outcomes = {client["client"]: client["outcome"] for client in row["clients"]}
        assert re.fullmatch("Ray ended its process, since the memory of its node .* was full", outcomes.pop(1))
        assert set(outcomes.values()) == {"ok"}
        assert {loss["cause"] for loss in row["lost"]} == {"out of memory"}
        assert row["ledger"]["actors_lost"] == len([loss for loss in row["lost"] if loss["actor"]]) > 0
    assert "so that fewer share the memory" in first["lost"][-1]["reason"]
    assert [there["actors"] for there in second["nodes"].values()] == [1]
    assert sha(tmp_path / "run") == sha(tmp_path / "quiet")


def test_a_driver_that_ray_ends_is_told_in_a_sentence(tmp_path):
    """All memory counts as full: whatever Ray may end, it does."""
    flags = f"train --task {TOY}:Toy --features None --evaluate-samples 0 --actors 1 --out {tmp_path / 'run'}"
    full = environment(RAY_memory_usage_threshold="0.001", RAY_memory_monitor_refresh_ms="100")
    command = [sys.executable, "-m", "fedray", *flags.split()]
    ran = subprocess.run(command, env=full, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 1, ran.stderr
    assert "Traceback" not in ran.stderr
    assert "died: Ray ended its process, since the memory of its node was full; it had not begun" in ran.stderr

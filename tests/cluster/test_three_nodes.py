"""Three nodes: all are used, one is killed in the middle of a round, one joins; the bits are those of one process."""

import os
import pickle
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import toy
from ray.cluster_utils import Cluster
from runs import CHAOS, sha, train

from fedray.record.run import Run

# A dead node is found in seconds, not in a minute.
HEALTH = {
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 2,
}  # fmt: skip
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@contextmanager
def three_nodes():
    """A cluster of three nodes of one CPU, which this process does not join."""
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=NODE | {"_system_config": HEALTH})
    try:
        yield cluster, [cluster.add_node(**NODE) for _ in range(2)]
    finally:
        cluster.shutdown()


SCRIPT = """
import pickle, sys, ray, fedray, toy
ray.cloudpickle.register_pickle_by_value(toy)
fedray.run(pickle.load(open(sys.argv[1], "rb")), sys.argv[2])
"""


def start(config, out):
    """Start a run in a process of its own, as a script of a user's would."""
    saved = out.with_suffix(".pickle")
    saved.write_bytes(pickle.dumps(config))
    path = os.pathsep.join([str(Path(toy.__file__).parent), *sys.path])
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(saved), str(out)], env=os.environ | {"PYTHONPATH": path})


def wait_for_row(process, out, fits):
    """Wait until the last row is one that fits, and return it."""
    deadline = time.monotonic() + 120
    while True:
        rows = Run(out).rows
        if rows and fits(rows[-1]):
            return rows[-1]
        assert process.poll() is None, f"it has ended, after {len(rows)} rounds"
        assert time.monotonic() < deadline, rows[-1:]
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(10 if CHAOS else 1))
def test_nodes_come_and_go(toy_config, tmp_path, seed):
    rng = random.Random(seed)
    settings = {"labels": 12, "local_epochs": 1, "train_batch_size": 8, "rounds": 60, "evaluate_samples": 0}
    train(toy_config(**settings), tmp_path / "here")
    gate = tmp_path / "gate"
    gate.touch()
    with three_nodes() as (cluster, workers):
        slow = {"slow": tuple(range(12)), "pause": 0.3, "gate": str(gate)}
        config = toy_config(**settings, **slow, actors=None, address=cluster.address)
        process, out = start(config, tmp_path / "run"), tmp_path / "run"
        try:
            row = wait_for_row(process, out, lambda row: len(row["nodes"]) == 3)
            names = {node.node_id[:12] for node in [cluster.head_node, *workers]}
            assert set(row["nodes"]) == names
            assert sum(there["clients"] for there in row["nodes"].values()) == 12
            assert all(there["actors"] == 1 and there["seconds"] >= 0.3 for there in row["nodes"].values())
            time.sleep(rng.uniform(0, 1.5))
            cluster.remove_node(workers[0], allow_graceful=False)
            wait_for_row(process, out, lambda row: len(row["nodes"]) == 2)
            joined = cluster.add_node(**NODE)
            row = wait_for_row(process, out, lambda row: len(row["nodes"]) == 3)
            assert set(row["nodes"]) == names - {workers[0].node_id[:12]} | {joined.node_id[:12]}
            gate.unlink()
            assert process.wait(60) == 0
        finally:
            process.kill()
    rows = Run.open(out).rows
    assert all([client["outcome"] for client in row["clients"]] == ["ok"] * 12 for row in rows)
    assert "node died" in {loss["cause"] for row in rows for loss in row["lost"]}
    assert sha(out) == sha(tmp_path / "here")
